import json
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnsdiff_dist import storage
from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.epoch_plan import PAD, EpochPlan, local_streams
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.data.stream import Batch, TrainStream
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare import publishing


@pytest.fixture(scope="module")
def manifest(dataset: str) -> Manifest:
    return load_manifest(dataset)


def _plan(manifest: Manifest) -> EpochPlan:
    return EpochPlan(manifest.train.rows, batch=440, streams=4, block_rows=300, seed=1)


def _stream(dataset: str, rank: int = 0, world_size: int = 1, prefetch: int = 2) -> TrainStream:
    manifest = load_manifest(dataset)
    streams = local_streams(4, rank, world_size)
    return TrainStream(dataset, manifest, _plan(manifest), streams, prefetch)


def _raw(dataset: str, manifest: Manifest) -> np.ndarray:
    tables = [pq.read_table(f"{dataset}/{shard.path}") for shard in manifest.train.shards]
    return np.concatenate(
        [np.stack([table["user"].to_numpy(), table["item"].to_numpy()], 1) for table in tables]
    )


def test_batches_are_what_the_plan_says(dataset: str, manifest: Manifest) -> None:
    raw, plan = _raw(dataset, manifest), _plan(manifest)
    batches = list(_stream(dataset).batches(epoch=3))
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
    alone = list(_stream(dataset).batches(0))
    ranks = [list(_stream(dataset, rank, world_size).batches(0)) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert set.union(*map(_content, parts)) == _content(whole)
        assert sum(part.weight.sum() for part in parts) == whole.weight.sum()


@pytest.mark.parametrize("first_step", [1, 7, 13])
def test_a_stream_starts_in_the_middle_of_an_epoch(dataset: str, first_step: int) -> None:
    whole, rest = list(_stream(dataset).batches(1)), list(_stream(dataset).batches(1, first_step))
    assert len(rest) == len(whole) - first_step
    for a, b in zip(whole[first_step:], rest, strict=True):
        assert a.step == b.step
        assert np.array_equal(a.users, b.users) and np.array_equal(a.items, b.items)


def test_read_ahead_does_not_change_the_batches(dataset: str) -> None:
    for a, b in zip(
        _stream(dataset, prefetch=1).batches(0),
        _stream(dataset, prefetch=5).batches(0),
        strict=True,
    ):
        assert np.array_equal(a.users, b.users)


# --- range reads -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of several shards of up to four row groups of 500 rows."""
    out = str(tmp_path_factory.mktemp("data") / "grouped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "ROW_GROUP", 500)
        patch.setattr(publishing, "SHARD_ROWS", 2_000)
        assert main(["prepare", out, "--synthetic", "--users", "700", "--items", "250"]) == 0
    shards = load_manifest(out).train.shards
    assert len(shards) > 1 and len(shards[0].row_groups) == 4
    return out


@pytest.fixture
def remote(grouped: str) -> Iterator[str]:
    """The same in a store that is not the local disk."""
    memory = fsspec.filesystem("memory")
    memory.put(grouped, "/grouped", recursive=True)
    yield "memory://grouped"
    memory.rm("/grouped", recursive=True)


def _ids(url: str, epoch: int = 0) -> list[list[int]]:
    return [batch.users.tolist() + batch.items.tolist() for batch in _stream(url).batches(epoch)]


def _interfere(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Callable[[], bytes]], bytes]
) -> Counter[tuple[str, int]]:
    """``act`` on the n-th (from 1) range read of the same place of the memory store."""
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
    shards, stream = load_manifest(remote).train.shards, _stream(remote)
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
    assert time.monotonic() - started < 3
    line = str(caught.value)
    assert "\n" not in line and line.startswith("memory://grouped/train/part-0000")
    assert "cannot read row group " in line and "the host does not answer" in line


def test_bytes_that_stay_wrong_are_damage(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(attempt: int, read: Callable[[], bytes]) -> bytes:
        data = read()
        return data if data.endswith(b"PAR1") else bytes(len(data))

    seen = _interfere(monkeypatch, act)
    with pytest.raises(UserError, match=r"part-0000\d\.parquet row group \d: damaged"):
        _ids(remote)
    assert max(seen.values()) == 3


def test_checksums_are_of_the_bytes_between_the_footers_offsets(grouped: str) -> None:
    for shard in load_manifest(grouped).train.shards:
        content = Path(grouped, shard.path).read_bytes()
        columns = pq.read_metadata(f"{grouped}/{shard.path}").to_dict()["row_groups"]
        for group, crc in zip(columns, shard.row_group_crc32, strict=True):
            start = min(filter(None, (group["columns"][0][f"{kind}_page_offset"]
                                      for kind in ("dictionary", "data"))))  # fmt: skip
            size = sum(column["total_compressed_size"] for column in group["columns"][:2])
            assert zlib.crc32(content[start : start + size]) == crc
        assert shard.footer_bytes == int.from_bytes(content[-8:-4], "little") + 8
        assert zlib.crc32(content[-shard.footer_bytes :]) == shard.footer_crc32


# --- damage ----------------------------------------------------------------------------


@pytest.fixture
def damaged(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "damaged"))


def _read_all(folder: Path) -> None:
    list(_stream(str(folder)).batches(0))


def test_a_missing_shard_is_named(damaged: Path) -> None:
    (damaged / "train/part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"train/part-00000\.parquet.*no such file"):
        _read_all(damaged)


def test_a_truncated_shard_is_named(damaged: Path) -> None:
    shard = damaged / "train/part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train/part-00000\.parquet: \d+ bytes.*truncated"):
        _read_all(damaged)


def test_a_shard_whose_end_was_lost_is_named(damaged: Path) -> None:
    shard = damaged / "train/part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100] + bytes(100))
    with pytest.raises(UserError, match=r"train/part-00000\.parquet footer: damaged"):
        _read_all(damaged)


def test_damage_inside_a_row_group_is_named(damaged: Path) -> None:
    shard = damaged / "train/part-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[4:60] = bytes(56)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train/part-00000\.parquet row group 0: damaged"):
        _read_all(damaged)


def _rewrite(damaged: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another valid Parquet file, of whose footer the manifest has the size and checksum."""
    shard = damaged / "train/part-00000.parquet"
    pq.write_table(change(pq.read_table(shard)), shard, row_group_size=65_536)
    _promise_footer(damaged)


def _promise_footer(damaged: Path) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    content = (damaged / shard["path"]).read_bytes()
    size = int.from_bytes(content[-8:-4], "little") + 8
    shard.update(bytes=len(content), footer_bytes=size, footer_crc32=zlib.crc32(content[-size:]))
    (damaged / "manifest.json").write_text(json.dumps(manifest))


def test_a_shard_of_another_size_is_refused(damaged: Path) -> None:
    shard = damaged / "train/part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:4] + b"-" + shard.read_bytes()[4:])
    with pytest.raises(UserError, match="changed since"):
        _read_all(damaged)


def test_a_shard_of_other_content_is_refused(damaged: Path) -> None:
    _rewrite(damaged, lambda table: table.take(np.arange(len(table))[::-1]))
    with pytest.raises(UserError, match=r"part-00000\.parquet row group 0: .*changed since"):
        _read_all(damaged)


def _varint(value: int) -> bytes:
    """An i64 in Thrift's compact protocol."""
    value, out = 2 * value, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("forged", ["uncompressed", "compressed"])
def test_a_footer_that_promises_absurd_sizes_is_refused(damaged: Path, forged: str) -> None:
    shard = damaged / "train/part-00000.parquet"
    content, item = shard.read_bytes(), pq.read_metadata(shard).row_group(0).column(1)
    old, new = b"", b""
    for kind in ("uncompressed", "compressed"):  # fields 6 and 7 of ColumnMetaData
        size = getattr(item, f"total_{kind}_size")
        old += b"\x16" + _varint(size)
        new += b"\x16" + _varint(1 << 40 if kind == forged else size)
    length = int.from_bytes(content[-8:-4], "little")
    body, footer = content[: -8 - length], content[-8 - length : -8]
    assert footer.count(old) == 1
    footer = footer.replace(old, new)
    shard.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    _promise_footer(damaged)
    with pytest.raises(UserError, match=r"part-00000\.parquet row group 0: damaged \([ab]"):
        _read_all(damaged)


def test_a_shard_with_other_rows_than_the_manifest_is_refused(damaged: Path) -> None:
    _rewrite(damaged, lambda table: table.slice(1))
    with pytest.raises(UserError, match="changed since"):
        _read_all(damaged)


def test_a_shard_without_the_column_is_refused(damaged: Path) -> None:
    _rewrite(
        damaged, lambda table: table.rename_columns(["user", "thing", *table.column_names[2:]])
    )
    with pytest.raises(UserError, match="no int64 column 'item'"):
        _read_all(damaged)


def test_an_id_out_of_range_is_refused_with_its_row_group(damaged: Path) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["items"] -= 1
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"row group 0: item \d+ is not in 0\.\."):
        _read_all(damaged)


def test_a_flipped_bit_of_a_footer_is_refused_unseen(damaged: Path) -> None:
    """Arrow aborts the process over some of them."""
    shard = damaged / "train/part-00000.parquet"
    content = shard.read_bytes()
    for place in range(1, 400, 7):
        flipped = bytearray(content)
        flipped[-place] ^= 1 << (place % 8)
        shard.write_bytes(flipped)
        with pytest.raises(UserError, match=r"part-00000\.parquet footer: damaged"):
            _read_all(damaged)


def test_a_single_flipped_bit_is_never_trained_on(damaged: Path, dataset: str) -> None:
    """The manifest's checksums see what the decoder takes for other numbers."""
    shard = damaged / "train/part-00000.parquet"
    content = shard.read_bytes()
    clean = [batch.users.tolist() + batch.items.tolist() for batch in _stream(dataset).batches(0)]
    for position in range(4, len(content) - 8, len(content) // 60):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        shard.write_bytes(flipped)
        try:
            read = [
                batch.users.tolist() + batch.items.tolist()
                for batch in _stream(str(damaged)).batches(0)
            ]
        except UserError:
            continue
        assert read == clean  # a byte that holds no data, such as a statistic


def test_a_dataset_of_an_older_schema_version_is_prepared_again(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["schema_version"] = 2
    for shard in manifest["splits"]["train"]["shards"]:
        del shard["row_group_crc32"], shard["footer_bytes"], shard["footer_crc32"]
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="run `cnsdiff prepare` again"):
        load_manifest(str(damaged))
    again = ["prepare", str(damaged), "--synthetic", "--users", "700", "--items", "250"]
    (damaged / "train" / "mine").write_text("a user's file")
    assert main([*again, "--overwrite"]) == 2
    assert "train/mine: not of the dataset there" in capsys.readouterr().err
    (damaged / "train" / "mine").unlink()
    assert main([*again, "--overwrite"]) == 0
    _read_all(damaged)
