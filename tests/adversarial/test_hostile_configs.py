"""Hostile configs and overrides: refused in one line or taken."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cnsdiff_dist.config import Config, dump_config, load_config
from tests.support.hostile import Victim, cases, within
from tests.support.hostile_datasets import REFUSED, outcome
from tests.support.mutating import mutated, seeds

# Each of these broke something once, or is known to break other loaders.
ODD_YAML = [
    "data: &a [*a]\n",
    "data: &a\n  x: *a\n",
    "&a\nx: *a\n",
    "a: " + "[" * 3_000 + "]" * 3_000,
    "{a: " * 600 + "1" + "}" * 600,
    "run: {seed: " + "9" * 10_000 + "}",
    "run: {seed: 0x" + "f" * 10_000 + "}",
    "data: {url: 2001-99-99}",
    "data: {streams: !!int x}",
    "data: {streams: !!float x}",
    "data: {streams: !!bool x}",
    "data: {streams: !!timestamp x}",
    '"a\\nb": 1',
    '"data\\nx": {"ur\\nl": 1}',
    'data: {"a\\u2028b": 1}',
    "data: {[1]: 2}",
    "<<: 3",
    "data: {streams: '" + "x" * 100_000 + "'}",
    "data: \x00",
    "1: 2",
    "~: 1",
    "? [1]\n: 2",
    "a: 1\n---\n",
    "'" + "x" * 50_000 + "': 1",
    "data: !!binary é",
    "data: !!set {a}",
    "data: !!omap [a: 1]",
    "data: !!python/object/apply:os.system ['touch owned']",
    "!!python/name:os.system",
    'run: {seed: !!python/object/apply:eval [\'open("owned", "w")\']}',
    "data: !!python/object/new:os.system ['touch owned']",
    "data: !!python/module:os",
    "tables: {lr: .nan}",
    "tables: {lr: -.inf}",
    "tables: {lr: 1e999}",
    "model: {dim: 1e400}",
    "train: {select_metric: 'recall@" + "9" * 5_000 + "'}",
    "model: {fan_out: [[[1]]]}",
    "run: {seed: 1:2:3}",
    "data: {url: '\\ud800'}",
    "\ufeffdata: {}",
    "%YAML 9.9\n---\n{}",
]


def _laughs(levels: int, pair: str) -> str:
    """YAML in which every level refers nine times to the one before."""
    head = f"a0: &a0 {pair}\n"
    for level in range(1, levels):
        head += f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]\n"
    return head + f"data: {{url: *a{levels - 1}}}\n"


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _loaded(text: bytes | str, *overrides: str) -> Any:
    Path("config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with within(60):
        found = outcome(lambda: load_config("config.yaml", list(overrides)))
    assert not Path("owned").exists()
    if found != REFUSED:
        assert isinstance(found, Config)
        assert load_config(_saved(found), []) == found
    return found


def _saved(config: Config) -> str:
    Path("saved.yaml").write_text(dump_config(config))
    return "saved.yaml"


@pytest.mark.usefixtures("in_an_empty_folder")
def test_odd_yaml_is_refused_in_one_line() -> None:
    failed = []
    for text in ODD_YAML:
        try:
            _loaded(text)
        except Exception as error:
            failed.append(f"{text[:50]!r}: {type(error).__name__}: {str(error)[:60]}")
    assert not failed, "\n".join(failed)


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("pair", ["[x, y]", "'lol'", "{a: 1e9}"])
def test_aliases_do_not_multiply(pair: str) -> None:
    assert _loaded(_laughs(8, pair)) == REFUSED


@pytest.mark.usefixtures("in_an_empty_folder")
@cases(100)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_random_text_is_a_config_or_refused(text: str | bytes) -> None:
    try:
        _loaded(text)
    except UnicodeEncodeError:
        assert isinstance(text, str)  # a lone surrogate, that no file can hold


_PLAIN = [st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)]
_ODD = st.sampled_from([10**40, "1e400", "nan", "a\nb", "é", b"x", float("nan")])


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(st.text(max_size=4), inner, max_size=2)
    return st.one_of(st.lists(inner, max_size=3), mappings)


LEAVES = st.recursive(st.one_of(*_PLAIN, _ODD), _nested, max_leaves=4)
KEYS = [
    (name, key)
    for name, field in Config.model_fields.items()
    for key in type(field.default).model_fields
]


@pytest.mark.usefixtures("in_an_empty_folder")
@cases(120)
@given(st.dictionaries(st.sampled_from(KEYS), LEAVES, min_size=1, max_size=3))
def test_a_value_of_any_type_at_any_key(values: dict[tuple[str, str], Any]) -> None:
    tree: dict[str, Any] = {}
    for (name, key), value in values.items():
        tree.setdefault(name, {})[key] = value
    _loaded(yaml.safe_dump(tree))


@pytest.mark.usefixtures("in_an_empty_folder")
@cases(100)
@given(
    st.sampled_from([".".join(key) for key in KEYS] + ["data", "", ".", "data.url.x", "a\nb"]),
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(["&a [*a]", "2001-99-99", "!!int x", "9" * 5_000, "[" * 500, "a\nb"]),
    ),
)
def test_overrides_are_taken_or_refused(key: str, value: str) -> None:
    _loaded("", f"{key}={value}")


def test_config_yaml_of_a_run_is_refused_or_read(attacked: Victim) -> None:
    @cases(60)
    @given(seeds())
    def run(seed: int) -> None:
        path = attacked.restore().parents[1] / "config.yaml"
        path.write_bytes(mutated(path.read_bytes(), seed))
        attacked.open()

    run()
    failed = []
    for text in ODD_YAML:
        (attacked.restore().parents[1] / "config.yaml").write_bytes(text.encode())
        try:
            attacked.open()
        except Exception as error:
            failed.append(f"{text[:40]!r}: {type(error).__name__}: {str(error)[:60]}")
    assert not failed, "\n".join(failed)
