"""Dataset files that a node fetches once as one local file, whole or not at all."""

import hashlib
from multiprocessing import get_context
from pathlib import Path

import pytest

from cnsdiff_dist import storage
from cnsdiff_dist.data.node_cache import local_file
from cnsdiff_dist.data.schema import Blob
from cnsdiff_dist.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNSDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "there") if request.param == "local" else f"memory://{tmp_path.name}"


def _put(root: str, *parts: bytes) -> list[Blob]:
    blobs = []
    for number, part in enumerate(parts):
        path = f"graph/part-{number}.bin"
        storage.write_bytes(f"{root}/{path}", part)
        blobs.append(Blob(path=path, bytes=len(part), sha256=hashlib.sha256(part).hexdigest()))
    return blobs


def test_parts_become_one_file(root: str, cache: Path) -> None:
    blobs = _put(root, b"one", b"", b"three")
    path = local_file(root, blobs, verify=True)
    assert path.read_bytes() == b"onethree" and path.is_relative_to(cache)
    storage.delete_tree(root)  # it is not read again
    assert local_file(root, blobs, verify=True) == path


def test_a_newer_version_is_another_file(root: str) -> None:
    assert local_file(root, _put(root, b"one"), verify=True).read_bytes() == b"one"
    assert local_file(root, _put(root, b"two, longer"), verify=True).read_bytes() == b"two, longer"


def test_a_local_file_is_used_where_it_is(tmp_path: Path, cache: Path) -> None:
    path = local_file(str(tmp_path), _put(str(tmp_path), b"here"), verify=True)
    assert path == tmp_path / "graph/part-0.bin" and not cache.exists()


@pytest.mark.parametrize("damage", [b"twO", b"tw", b"two and more"])
def test_damage_is_named_and_not_kept(root: str, cache: Path, damage: bytes) -> None:
    for parts in ((b"one", b"two", b"three"), (b"two",)):
        blobs = _put(root, *parts)
        bad = next(blob.path for blob, part in zip(blobs, parts, strict=True) if part == b"two")
        storage.write_bytes(f"{root}/{bad}", damage)
        with pytest.raises(UserError, match=f"{Path(bad).name}: damaged: its sha256"):
            local_file(root, blobs, verify=True)
    assert not [path for path in cache.rglob("*.bin*") if path.is_file()]


def test_a_missing_part_is_named(root: str, cache: Path) -> None:
    blobs = _put(root, b"one", b"two")
    storage.delete_tree(f"{root}/{blobs[1].path}")
    with pytest.raises(UserError, match=r"part-1.bin: cannot read"):
        local_file(root, blobs, verify=True)
    assert not [path for path in cache.rglob("*.bin*") if path.is_file()]


def _fetch(root: str, blobs: list[Blob]) -> tuple[str, int]:
    path = local_file(root, blobs, verify=True)
    return str(path), path.stat().st_ino


def test_the_ranks_of_a_node_share_one_copy(tmp_path: Path) -> None:
    root = str(tmp_path / "there")
    blobs = _put(root, b"a" * 3_000_000, b"b" * 3_000_000)
    with get_context("spawn").Pool(4) as pool:
        found = pool.starmap(_fetch, [(root, blobs)] * 4)
    assert len(set(found)) == 1
