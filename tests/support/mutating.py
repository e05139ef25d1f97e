"""Hostile variants of bytes and of JSON trees; and datasets read, a case after the other, in a
process that may crash, run out of memory or open what it must not:
`python -m tests.support.mutating`."""

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from cnsdiff_dist.data.dataset import load_manifest, read_ids, read_split
from cnsdiff_dist.data.epoch_plan import EpochPlan
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.data.schema import Manifest, leading_bytes
from cnsdiff_dist.data.stream import TrainStream
from cnsdiff_dist.errors import UserError

Place = tuple[str | int, ...]
DELETE = object()

# What a reader may trip over wherever a number, a name or a list is expected.
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, -(2**63), 10**40,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0", "nan", "\n", "a\nb", "\x00",
    "\u2028", "é", "\U0001f4a3", "x" * 5_000, "..", "../x", "/etc/passwd", "~/x",
    "file:///etc/passwd", "s3://bucket/x", "memory://x", "http://127.0.0.1:9/x", "a/../../x",
    [], [0], [None], [[]], {}, {"x": 1}, [1] * 1_000,
]  # fmt: skip


def mutated(content: bytes, seed: int) -> bytes:
    """One to three changes: flips, cuts, insertions, swaps, blanks, repeats."""
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


_CHANGES: list[Callable[[bytes, random.Random], bytes]] = [
    _flip, _flip, _flip, _overwrite, _extreme, _truncate, _insert, _remove, _swap, _blank, _repeat,
]  # fmt: skip


def _place(content: bytes, draw: random.Random) -> int:
    """Half of the time near the end, where formats keep their index."""
    near = draw.random() < 0.5 and len(content) > 700
    return draw.randrange(len(content) - 700 if near else 0, max(len(content), 1))


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32)


# --- JSON -----------------------------------------------------------------------------------


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Every place in a tree, its root too."""
    yield at
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*at, key))


def replaced(tree: Any, at: Place, value: Any) -> Any:
    """A copy of the tree with another value, or nothing, at a place."""
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
    """JSON of a tree with keys twice, nested deeply, numbers that are too long, .."""
    draw, clean = random.Random(seed), json.dumps(tree)
    at = draw.choice([place for place, mark in enumerate(clean) if mark in "{["]) + 1
    deep = draw.choice([50, 500, 5_000, 100_000])
    more = "," if clean[at] not in "}]" else ""
    return draw.choice([
        clean[:at] + "[" * deep + "]" * deep + more + clean[at:],
        clean[:at] + '"users":' + '{"a":' * deep + "1" + "}" * deep + more + clean[at:],
        clean[:at] + '"users": 1, "users": 2' + more + clean[at:],
        "\ufeff" + clean, clean + clean, "[" * deep, clean.replace("1", "9" * 5_000, 1),
        clean.replace('"', "'"), json.dumps(clean), "",
    ]).encode()  # fmt: skip


def json_texts(tree: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: of a changed tree, or its text changed, or odd text."""
    return st.one_of(
        seeds().map(lambda seed: json.dumps(changed_tree(tree, seed)).encode()),
        seeds().map(lambda seed: mutated(json.dumps(tree).encode(), seed)),
        seeds().map(lambda seed: odd_text(tree, seed)),
    )


# --- datasets -------------------------------------------------------------------------------

REFUSED = "refused"
SHARDS = {"train": "train", "valid_ood": "valid_ood", "users": "ids/users"}
_ROOM = 3 << 30


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or REFUSED for a UserError of one line; anything else passes."""
    try:
        return call()
    except UserError as error:
        line = str(error)
        assert line and len(line.splitlines()) == 1, f"not one line: {line!r}"
        assert len(line) < 2_000, f"a line of {len(line)} characters: {line[:200]!r}"
        return REFUSED


def shard_of(tree: Any, part: str) -> Any:
    """The first shard of a split or id map in a manifest's tree."""
    split = tree["splits"][part] if part in tree["splits"] else tree["ids"][part]
    return split["shards"][0]


def reseal(tree: Any, part: str, content: bytes, follow: bool) -> None:
    """Have a manifest promise ``content``, as whoever changed the file would; ``follow`` takes
    the numbers of rows from its footer too."""
    shard = shard_of(tree, part)
    size = min(int.from_bytes(content[-8:-4], "little") + 8, len(content))
    footer = content[len(content) - size :]
    shard.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    shard.update(footer_bytes=size, footer_crc32=zlib.crc32(footer))
    try:
        found = pq.read_metadata(pa.BufferReader(footer))
        groups = range(found.num_row_groups)
        crc32 = [zlib.crc32(content[slice(*leading_bytes(found, n))]) for n in groups]
        rows = [found.row_group(n).num_rows for n in groups]
    except Exception:  # no Parquet any more: nothing to promise
        return
    if follow:
        shard.update(row_group_crc32=crc32, row_groups=rows, rows=sum(rows))
        (tree["splits"].get(part) or tree["ids"][part])["rows"] = sum(rows)
    elif len(rows) == len(shard["row_groups"]):
        shard["row_group_crc32"] = crc32


def read(url: str, part: str) -> Any:
    """One part of a dataset, through the module that trains or evaluates with it."""
    manifest = load_manifest(url)
    if part == "users":
        return read_ids(url, manifest, "users").to_pydict()
    if part != "train":
        return _legal(manifest, *read_split(url, manifest, part))
    return _legal(manifest, *_train_rows(url, manifest, None))


def _train_rows(url: str, manifest: Manifest, steps: int | None) -> Iterator[Any]:
    plan = EpochPlan(manifest.train.rows, batch=440, streams=4, block_rows=300, seed=1)
    stream = TrainStream(url, manifest, plan, [0, 1, 2, 3], 2).batches(0)
    batches = list(islice(stream, steps))
    if steps is None:
        assert sum(batch.valid_rows for batch in batches) == manifest.train.rows
    return (np.concatenate([getattr(b, side) for b in batches]) for side in _SIDES)


_SIDES = ("users", "items")


def _legal(manifest: Any, users: Any, items: Any) -> Any:
    for ids, limit in ((users, manifest.users), (items, manifest.items)):
        assert ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < limit
    return users.tolist(), items.tolist()


def read_all(url: str) -> Any:
    graph = open_graph(url, load_manifest(url))
    arrays = (graph.user_indptr, graph.user_items, graph.item_indptr, graph.item_users)
    return [array.tolist() for array in arrays], [read(url, part) for part in SHARDS]


def _read_what(url: str, kind: str) -> Any:
    return read_all(url) if kind == "manifest" else read(url, kind)


class _Watch:
    """Notes what is opened outside a folder, and every connection."""

    def __init__(self, folder: Path) -> None:
        self._allowed = (str(folder), sys.prefix, sys.base_prefix, "/dev/null", "/proc/self")
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, words: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(words[0], str | bytes):
            path = os.path.realpath(os.fsdecode(words[0]))
            if not path.startswith(self._allowed) and "cnsdiff_dist" not in path:
                self.seen.append(path)
        elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
            self.seen.append(f"{event} {words[-1]}")


def _batch(dataset: str, kind: str, first: int, last: int) -> None:
    """Print a line before and after each case; the last line says where a crash was."""
    folder = Path(tempfile.mkdtemp(dir=Path(dataset).parent)).resolve() / "hostile"
    shutil.copytree(dataset, folder)
    tree = json.loads((folder / "manifest.json").read_text())
    everything = kind == "manifest"
    clean = _read_what(dataset, kind)
    _limit_memory()
    watch = _Watch(folder)
    for case in range(first, last):
        if everything:
            (folder / "manifest.json").write_bytes(manifest_text(tree, case))
        else:
            _change_shard(folder, tree, kind, case)
        print(f"case {case}", flush=True)
        try:
            found = outcome(partial(_read_what, str(folder), kind))
            verdict = "refused" if found == REFUSED else "same" if found == clean else "changed"
        except BaseException as error:
            verdict = f"{type(error).__name__}: {error}"[:300]
        if watch.seen:
            verdict = f"opened {watch.seen}"
            watch.seen.clear()
        print(json.dumps([case, verdict]), flush=True)


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))


def _change_shard(folder: Path, tree: Any, part: str, case: int) -> None:
    changed, path = copy.deepcopy(tree), shard_of(tree, part)["path"]
    backup = folder / "clean"
    if not backup.exists():
        shutil.copy(folder / path, backup)
    content = mutated(backup.read_bytes(), case)
    reseal(changed, part, content, follow=case % 3 == 0)
    (folder / path).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(changed))


_SWEPT = [DELETE, [], {}, True, 0, -1, 2**53, -(2**63), 10**40, None, "\u2028", "../x", "x" * 5_000]


def sweep(tree: Any) -> list[tuple[Place, Any]]:
    """Every place of a manifest with every value that broke something; of parts that are alike
    only one."""
    alike = {"valid_iid", "test_iid", "test_ood", "items", "item_indptr", "item_users", "dropped"}
    at = [place for place in places(tree) if place and not alike.intersection(place[1:])]
    return [(place, value) for place in at for value in [*_SWEPT, 1, "near"]]


def manifest_text(tree: Any, case: int) -> bytes:
    """The sweep first; then two changed values, changed bytes or odd text."""
    swept = sweep(tree)
    if case < len(swept):
        at, value = swept[case]
        if value == "near":
            value = (_number_at(tree, at) or 0) + 1
        return json.dumps(replaced(tree, at, value)).encode()
    if case % 3 == 0:
        return mutated(json.dumps(tree).encode(), case)
    return odd_text(tree, case) if case % 3 == 1 else json.dumps(changed_tree(tree, case)).encode()


def _first(url: str, part: str) -> Any:
    """A step is enough: each reads a row group."""
    return next(_train_rows(url, load_manifest(url), 1)) if part == "train" else read(url, part)


def _open_bomb(dataset: str, part: str) -> None:
    """Print how many MiB the memory peaked above what it was, and the outcome."""
    _limit_memory()
    before = peak_mib()
    found = outcome(partial(_first, dataset, part))
    print(json.dumps([peak_mib() - before, isinstance(found, str)]))


def peak_mib(reset: bool = False) -> int:
    """What this process had resident at most; not getrusage's, in which its parent's counts."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


if __name__ == "__main__":
    url, what, *bounds = sys.argv[1:]
    if bounds:
        _batch(url, what, *map(int, bounds))
    else:
        _open_bomb(url, what)
