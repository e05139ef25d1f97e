"""The graph on disk, and the checks on opening a dataset."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnsdiff_dist.data.dataset import load_manifest, read_ids, read_split
from cnsdiff_dist.data.graph import index_dtype, open_graph, write_csr
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.errors import UserError
from tests.support.preparing import prepare, write_parquet


@pytest.fixture
def made(tmp_path: Path) -> tuple[str, Manifest]:
    log = write_parquet(tmp_path / "log.parquet", user=[5, 5, 7, 7, 9], item=[1, 2, 2, 3, 3])
    out = str(tmp_path / "out")
    words = ["--valid-fraction", 0, "--valid-ood-fraction", 0, "--test-iid", log]
    test = write_parquet(tmp_path / "test.parquet", user=[5, 9], item=[3, 1])
    words[-1] = test
    return out, prepare(out, "--train", log, *words)


def test_both_directions(made: tuple[str, Manifest]) -> None:
    graph = open_graph(*made)
    assert graph.user_indptr.tolist() == [0, 2, 4, 5]
    assert graph.user_items.tolist() == [0, 1, 1, 2, 2]
    assert graph.item_indptr.tolist() == [0, 1, 3, 5]
    assert graph.item_users.tolist() == [0, 0, 1, 1, 2]
    assert graph.user_indptr.dtype == np.int64
    assert graph.user_items.dtype == np.int32
    assert isinstance(graph.item_users, np.memmap)
    assert not graph.item_users.flags.writeable


@given(st.lists(st.lists(st.integers(0, 9), unique=True), max_size=6), st.integers(1, 4))
def test_writing_in_chunks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("csr")
    flat = np.array([value for row in rows for value in sorted(row)], np.int64)
    chunks = [flat[start : start + chunk] for start in range(0, len(flat), chunk)]
    degree = np.array([len(row) for row in rows], np.int64)
    degrees = [degree[start : start + chunk] for start in range(0, len(degree), chunk)]
    (folder / "graph").mkdir()
    paths = write_csr(folder, "user", "item", degrees, chunks, "int32", file_bytes=20)
    sizes = [[(folder / path).stat().st_size for path in files] for files in paths]
    assert all(size == 20 for files in sizes for size in files[:-1])
    whole = [b"".join((folder / path).read_bytes() for path in files) for files in paths]
    indptr, indices = np.frombuffer(whole[0], "<i8"), np.frombuffer(whole[1], "<i4")
    read = [indices[a:b].tolist() for a, b in pairwise(indptr)]
    assert read == [sorted(row) for row in rows]


def test_an_empty_graph_opens(made: tuple[str, Manifest]) -> None:
    url, manifest = made
    for name in ("user_items", "item_users"):
        (Path(url) / f"graph/{name}-00000.bin").write_bytes(b"")
    nothing = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    empty = {
        name: (getattr(manifest.graph, name)[0].model_copy(update=nothing),)
        for name in ("user_items", "item_users")
    }
    graph = manifest.graph.model_copy(update={"edges": 0, **empty})
    arrays = open_graph(url, manifest.model_copy(update={"graph": graph}))
    assert len(arrays.user_items) == len(arrays.item_users) == 0


def test_index_dtype_fits_every_row() -> None:
    assert index_dtype(2**31 - 1, 5) == "int32"
    assert index_dtype(5, 2**31) == "int64"


def test_a_truncated_or_missing_array_is_named(made: tuple[str, Manifest]) -> None:
    url, manifest = made
    path = Path(url) / "graph/user_items-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"user_items-00000.bin: damaged: its sha256"):
        open_graph(url, manifest)
    path.unlink()
    with pytest.raises(UserError, match=r"user_items-00000.bin: cannot read: no such file"):
        open_graph(url, manifest)


def _sealed(manifest: Manifest, path: Path) -> Manifest:
    """Make the manifest fit the present content of a file of ``test_iid``."""
    split = manifest.splits["test_iid"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    shard = split.shards[0].model_copy(update={"sha256": digest})
    changed = split.model_copy(update={"shards": [shard]})
    return manifest.model_copy(update={"splits": {**manifest.splits, "test_iid": changed}})


def test_damaged_shards_are_named(made: tuple[str, Manifest]) -> None:
    url, manifest = made
    path = Path(url) / "test_iid/part-00000.parquet"
    good = path.read_bytes()
    for columns, expected in (
        ({"user": [0, 3], "item": [0, 1]}, r"user 3 is not in 0\.\.2"),
        ({"user": [0, -1], "item": [0, 1]}, r"user -1 is not in 0\.\.2"),
        ({"user": [0], "item": [0]}, "1 rows, where the manifest promises 2"),
        ({"user": ["a", "b"], "item": [0, 1]}, "column user is not int64"),
        ({"user": [0, None], "item": [0, 1]}, "column user is not int64 without nulls"),
        ({"user": [0, 1]}, r"part-00000.parquet: damaged"),
    ):
        write_parquet(path, **columns)
        with pytest.raises(UserError, match=r"part-00000.parquet: damaged \(its sha256"):
            read_split(url, manifest, "test_iid")
        with pytest.raises(UserError, match=expected):  # a manifest may lie
            read_split(url, _sealed(manifest, path), "test_iid")
    path.write_bytes(good[:-10])
    with pytest.raises(UserError, match=r"part-00000.parquet: damaged"):
        read_split(url, manifest, "test_iid")
    path.unlink()
    with pytest.raises(UserError, match=r"part-00000.parquet: cannot read: no such file"):
        read_split(url, manifest, "test_iid")


def test_ids_in_row_order(made: tuple[str, Manifest]) -> None:
    users, items = read_ids(*made, "users"), read_ids(*made, "items")
    assert users.to_pydict() == {"id": [5, 7, 9], "row": [0, 1, 2], "degree": [2, 2, 1]}
    assert items.column_names == ["id", "row", "degree", "environment"]


def test_a_bad_manifest_is_named(made: tuple[str, Manifest]) -> None:
    path = Path(made[0]) / "manifest.json"
    path.write_text(path.read_text().replace('"users"', '"usres"', 1))
    with pytest.raises(UserError, match=r"manifest.json: not a dataset manifest: users"):
        load_manifest(made[0])


@pytest.mark.parametrize("folder", ["test_iid", "ids/items"])
def test_a_flipped_bit_in_a_page_is_refused(made: tuple[str, Manifest], folder: str) -> None:
    url, manifest = made
    path = Path(url) / folder / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    pages = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content[pages.data_page_offset + pages.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    read = {"test_iid": lambda: read_split(url, manifest, "test_iid")}
    with pytest.raises(UserError, match="damaged"):
        read.get(folder, lambda: read_ids(url, manifest, "items"))()


def test_a_graph_whose_counts_do_not_match_its_files(made: tuple[str, Manifest]) -> None:
    url, manifest = made
    with pytest.raises(UserError, match=r"user_indptr-00000.bin has not the 40 bytes"):
        open_graph(url, manifest.model_copy(update={"users": 4}))
