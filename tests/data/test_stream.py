"""The batches of a train stream, and the range reads behind them."""

import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from cnsdiff_dist import storage
from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.epoch_plan import PAD
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare import shards as shard_writer
from tests.support.streams import plan_of, train_stream


@pytest.fixture(scope="module")
def manifest(dataset: str) -> Manifest:
    return load_manifest(dataset)


def _raw(dataset: str, manifest: Manifest) -> np.ndarray:
    tables = [pq.read_table(f"{dataset}/{shard.path}") for shard in manifest.train.shards]
    return np.concatenate(
        [np.stack([table["user"].to_numpy(), table["item"].to_numpy()], 1) for table in tables]
    )


def test_batches_are_what_the_plan_says(dataset: str, manifest: Manifest) -> None:
    raw, plan = _raw(dataset, manifest), plan_of(manifest)
    batches = list(train_stream(dataset).batches(epoch=3))
    assert [batch.step for batch in batches] == list(range(plan.steps))
    for batch in batches:
        assert batch.weight.sum() == batch.valid_rows == plan.valid_rows(batch.step)
        for stream in range(4):
            rows = plan.step_rows(3, batch.step, stream)
            part = slice(stream * batch.width, (stream + 1) * batch.width)
            valid = batch.weight[part] > 0
            assert np.array_equal(valid, rows != PAD)
            pairs = np.stack([batch.users[part], batch.items[part]], 1)[valid]
            assert np.array_equal(pairs, raw[rows[valid]])


def _content(batch: Batch) -> set[tuple[int, int]]:
    valid = batch.weight > 0
    return set(zip(batch.users[valid].tolist(), batch.items[valid].tolist(), strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_do_not_depend_on_the_world_size(dataset: str, world_size: int) -> None:
    alone = list(train_stream(dataset).batches(0))
    ranks = [list(train_stream(dataset, rank, world_size).batches(0)) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert set.union(*map(_content, parts)) == _content(whole)
        assert sum(part.weight.sum() for part in parts) == whole.weight.sum()


@pytest.mark.parametrize("first_step", [1, 7, 13])
def test_a_stream_starts_in_the_middle_of_an_epoch(dataset: str, first_step: int) -> None:
    whole, rest = (
        list(train_stream(dataset).batches(1)),
        list(train_stream(dataset).batches(1, first_step)),
    )
    assert len(rest) == len(whole) - first_step
    for a, b in zip(whole[first_step:], rest, strict=True):
        assert a.step == b.step
        assert np.array_equal(a.users, b.users) and np.array_equal(a.items, b.items)


def test_read_ahead_does_not_change_the_batches(dataset: str) -> None:
    for a, b in zip(
        train_stream(dataset, prefetch=1).batches(0),
        train_stream(dataset, prefetch=5).batches(0),
        strict=True,
    ):
        assert np.array_equal(a.users, b.users)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of several shards of up to four row groups of 500 rows."""
    out = str(tmp_path_factory.mktemp("data") / "grouped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "ROW_GROUP", 500)
        patch.setattr(shard_writer, "SHARD_ROWS", 2_000)
        assert main(["prepare", out, "--synthetic", "--users", "700", "--items", "250"]) == 0
    shards = load_manifest(out).train.shards
    assert len(shards) > 1 and len(shards[0].row_groups) == 4
    return out


@pytest.fixture
def remote(grouped: str) -> Iterator[str]:
    """The same dataset in a store that is not the local disk."""
    memory = fsspec.filesystem("memory")
    memory.put(grouped, "/grouped", recursive=True)
    yield "memory://grouped"
    for thread in threading.enumerate():  # a stream that has failed does not wait for its reads
        if thread.name.startswith("read-ahead"):
            thread.join()
    memory.rm("/grouped", recursive=True)


def _ids(url: str, epoch: int = 0) -> list[list[int]]:
    return [
        batch.users.tolist() + batch.items.tolist() for batch in train_stream(url).batches(epoch)
    ]


def _interfere(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Callable[[], bytes]], bytes]
) -> Counter[tuple[str, int]]:
    """Call ``act`` with n for the n-th range read, from 1, of each place of the memory store."""
    kind = type(fsspec.filesystem("memory"))
    original, seen = kind.cat_file, Counter[tuple[str, int]]()

    def cat_file(self: object, path: str, start: int, end: int) -> bytes:
        seen[path, start] += 1
        return act(seen[path, start], lambda: original(self, path, start=start, end=end))

    monkeypatch.setattr(kind, "cat_file", cat_file)
    return seen


def test_a_footer_is_read_once_and_a_row_group_in_one_piece(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _interfere(monkeypatch, lambda _, read: read())
    shards, stream = load_manifest(remote).train.shards, train_stream(remote)
    list(stream.batches(0))
    list(stream.batches(1))
    footers = {(f"/grouped/{shard.path}", shard.bytes - shard.footer_bytes) for shard in shards}
    assert [seen[footer] for footer in footers] == [1] * len(shards)
    assert len(seen) - len(footers) == sum(len(shard.row_groups) for shard in shards)


def test_transfers_that_fail_twice_are_tried_again(
    remote: str, grouped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(attempt: int, read: Callable[[], bytes]) -> bytes:
        if attempt <= 2:
            raise ConnectionResetError("connection reset by peer")
        return read()

    monkeypatch.setattr(storage.patience, "seconds", 20.0)
    retries = storage.patience.retries
    seen = _interfere(monkeypatch, act)
    assert _ids(remote) == _ids(grouped)
    assert min(seen.values()) >= 3 and storage.patience.retries > retries


def test_a_transfer_that_loses_bytes_is_tried_again(
    remote: str, grouped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(attempt: int, read: Callable[[], bytes]) -> bytes:
        data = read()
        return data if attempt > 2 else [data[:-7], bytes(len(data))][attempt - 1]

    _interfere(monkeypatch, act)
    assert _ids(remote) == _ids(grouped)


def test_a_store_that_stays_away_is_one_line_with_the_row_group(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(attempt: int, read: Callable[[], bytes]) -> bytes:
        data = read()
        if not data.endswith(b"PAR1"):
            raise ConnectionResetError("connection reset by peer")
        return data

    monkeypatch.setattr(storage.patience, "seconds", 0.3)
    _interfere(monkeypatch, act)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        _ids(remote)
    assert time.monotonic() - started < 60  # it does not wait for ever
    line = str(caught.value)
    assert "\n" not in line and line.startswith("memory://grouped/train/part-0000")
    assert "cannot read row group " in line and "the host does not answer" in line


def test_bytes_that_stay_wrong_are_damage(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(attempt: int, read: Callable[[], bytes]) -> bytes:
        data = read()
        return data if data.endswith(b"PAR1") else bytes(len(data))

    seen = _interfere(monkeypatch, act)
    with pytest.raises(UserError, match=r"part-0000\d\.parquet row group \d: damaged"):
        next(train_stream(remote, world_size=4, prefetch=1).batches(0))  # one read at a time
    assert max(seen.values()) == 3


def test_checksums_are_of_the_bytes_between_the_footers_offsets(grouped: str) -> None:
    for shard in load_manifest(grouped).train.shards:
        content = Path(grouped, shard.path).read_bytes()
        columns = pq.read_metadata(f"{grouped}/{shard.path}").to_dict()["row_groups"]
        for group, crc in zip(columns, shard.row_group_crc32, strict=True):
            start = min(
                filter(
                    None,
                    (group["columns"][0][f"{kind}_page_offset"] for kind in ("dictionary", "data")),
                )
            )
            size = sum(column["total_compressed_size"] for column in group["columns"][:2])
            assert zlib.crc32(content[start : start + size]) == crc
        assert shard.footer_bytes == int.from_bytes(content[-8:-4], "little") + 8
        assert zlib.crc32(content[-shard.footer_bytes :]) == shard.footer_crc32
