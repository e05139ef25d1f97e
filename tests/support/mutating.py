"""Hostile variants of bytes and of JSON trees."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

Place = tuple[str | int, ...]
DELETE = object()

_INTEGERS = [0, -1, 1, 2, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, -(2**63), 10**40]
_FLOATS = [0.5, -0.0, 1e308, float("nan"), float("inf")]
_TEXTS = ["", "x", "0", "nan", "\n", "a\nb", "\x00", "\u2028", "é", "\U0001f4a3", "x" * 5_000]
_PATHS = """.. ../x /etc/passwd ~/x file:///etc/passwd s3://bucket/x memory://x
            http://127.0.0.1:9/x a/../../x""".split()
_TREES: list[Any] = [[], [0], [None], [[]], {}, {"x": 1}, [1] * 1_000]
# Values that may break a reader which expects a number, a name or a list.
HOSTILE: list[Any] = [None, True, False, *_INTEGERS, *_FLOATS, *_TEXTS, *_PATHS, *_TREES]


def mutated(content: bytes, seed: int) -> bytes:
    """The content after one to three changes: flips, cuts, insertions, swaps, blanks, repeats."""
    draw = random.Random(seed)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        content = draw.choice(_CHANGES)(content, draw) if content else b""
    return content


def _flip(content: bytes, draw: random.Random) -> bytes:
    at = _place(content, draw)
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def _overwrite(content: bytes, draw: random.Random) -> bytes:
    at, noise = _place(content, draw), draw.randbytes(draw.randint(1, 8))
    return content[:at] + noise + content[at + len(noise) :]


def _extreme(content: bytes, draw: random.Random) -> bytes:
    at, width = _place(content, draw), draw.choice([1, 2, 4, 8])
    return content[:at] + draw.choice([b"\xff", b"\x7f", b"\x80"]) * width + content[at + width :]


def _truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: _place(content, draw)]


def _insert(content: bytes, draw: random.Random) -> bytes:
    at = _place(content, draw)
    return content[:at] + draw.randbytes(draw.randint(1, 16)) + content[at:]


def _remove(content: bytes, draw: random.Random) -> bytes:
    at = _place(content, draw)
    return content[:at] + content[at + draw.randint(1, 16) :]


def _swap(content: bytes, draw: random.Random) -> bytes:
    a, b, c = sorted(_place(content, draw) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _blank(content: bytes, draw: random.Random) -> bytes:
    at, size = _place(content, draw), draw.choice([1, 8, 64, 512])
    return content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    at, size = _place(content, draw), draw.randint(1, 256)
    return content[: at + size] + content[at:]


_CHANGES: list[Callable[[bytes, random.Random], bytes]]
_CHANGES = [_flip, _flip, _flip, _overwrite, _extreme, _truncate]
_CHANGES += [_insert, _remove, _swap, _blank, _repeat]


def _place(content: bytes, draw: random.Random) -> int:
    """A random place: half of the time near the end, where formats keep their index."""
    near = draw.random() < 0.5 and len(content) > 700
    return draw.randrange(len(content) - 700 if near else 0, max(len(content), 1))


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32)


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Every place in a tree, including its root."""
    yield at
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*at, key))


def replaced(tree: Any, at: Place, value: Any) -> Any:
    """A copy of the tree with another value at a place; DELETE removes it."""
    if not at:
        return None if value is DELETE else value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in at[:-1]:
        inner = inner[key]
    if value is DELETE:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return tree


def changed_tree(tree: Any, seed: int) -> Any:
    """The tree with one or two places deleted or given a hostile value."""
    draw = random.Random(seed)
    for _ in range(draw.choice([1, 1, 2])):
        at = draw.choice(list(places(tree)))
        near = _number_at(tree, at)
        if near is not None and draw.random() < 0.5:
            value: Any = near + draw.choice([-1, 1])
        else:
            value = draw.choice([DELETE, *HOSTILE])
        tree = replaced(tree, at, value)
    return tree


def _number_at(tree: Any, at: Place) -> int | None:
    for key in at:
        tree = tree[key]
    return tree if isinstance(tree, int) and not isinstance(tree, bool) else None


def odd_text(tree: Any, seed: int) -> bytes:
    """JSON of a tree with duplicate keys, deep nesting, numbers that are too long and the like."""
    draw, clean = random.Random(seed), json.dumps(tree)
    at = draw.choice([place for place, mark in enumerate(clean) if mark in "{["]) + 1
    deep = draw.choice([50, 500, 5_000, 100_000])
    more = "," if clean[at] not in "}]" else ""
    texts = [
        clean[:at] + "[" * deep + "]" * deep + more + clean[at:],
        clean[:at] + '"users":' + '{"a":' * deep + "1" + "}" * deep + more + clean[at:],
        clean[:at] + '"users": 1, "users": 2' + more + clean[at:],
        "\ufeff" + clean,
        clean + clean,
        "[" * deep,
        clean.replace("1", "9" * 5_000, 1),
        clean.replace('"', "'"),
        json.dumps(clean),
        "",
    ]
    return draw.choice(texts).encode()


def json_texts(tree: Any) -> st.SearchStrategy[bytes]:
    """JSON texts: of a changed tree, with changed bytes, or odd ones."""
    return st.one_of(
        seeds().map(lambda seed: json.dumps(changed_tree(tree, seed)).encode()),
        seeds().map(lambda seed: mutated(json.dumps(tree).encode(), seed)),
        seeds().map(lambda seed: odd_text(tree, seed)),
    )


_SWEPT = [DELETE, [], {}, True, 0, -1, 2**53, -(2**63), 10**40, None, "\u2028", "../x", "x" * 5_000]


def sweep(tree: Any) -> list[tuple[Place, Any]]:
    """Every place of a manifest with every value that broke something once.

    Of parts that are alike, such as the four held-out splits, only one is swept.
    """
    alike = {"valid_iid", "test_iid", "test_ood", "items", "item_indptr", "item_users", "dropped"}
    at = [place for place in places(tree) if place and not alike.intersection(place[1:])]
    return [(place, value) for place in at for value in [*_SWEPT, 1, "near"]]


def manifest_text(tree: Any, case: int) -> bytes:
    """The text of a case: first those of the sweep, then other changes of bytes, text or values."""
    swept = sweep(tree)
    if case < len(swept):
        at, value = swept[case]
        if value == "near":
            value = (_number_at(tree, at) or 0) + 1
        return json.dumps(replaced(tree, at, value)).encode()
    if case % 3 == 0:
        return mutated(json.dumps(tree).encode(), case)
    return odd_text(tree, case) if case % 3 == 1 else json.dumps(changed_tree(tree, case)).encode()
