import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.plan import PAD, EpochPlan, local_streams
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.data.stream import Batch, TrainStream
from cnsdiff_dist.errors import UserError


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
    with pytest.raises(UserError, match=r"train/part-00000\.parquet.*not a whole Parquet"):
        _read_all(damaged)


def test_damage_inside_a_row_group_is_named(damaged: Path) -> None:
    shard = damaged / "train/part-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[4:60] = bytes(56)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train/part-00000\.parquet row group 0: damaged"):
        _read_all(damaged)


def _rewrite(damaged: Path, change: object) -> None:
    shard = damaged / "train/part-00000.parquet"
    table = change(pq.read_table(shard))  # type: ignore[operator]
    pq.write_table(table, shard, row_group_size=65_536)


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


def test_a_single_flipped_bit_is_never_trained_on(damaged: Path, dataset: str) -> None:
    """Page checksums see what the decoder takes for other numbers."""
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
