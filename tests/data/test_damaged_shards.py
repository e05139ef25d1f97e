"""Shards that are damaged or replaced: named in one line, never trained on."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.errors import UserError
from tests.support.streams import train_stream


@pytest.fixture
def damaged(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "damaged"))


def _read_all(folder: Path) -> None:
    list(train_stream(str(folder)).batches(0))


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
    """Write another valid Parquet file whose footer fits the manifest."""
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
    """Arrow would abort the process over some of these footers."""
    shard = damaged / "train/part-00000.parquet"
    content = shard.read_bytes()
    for place in range(1, 400, 7):
        flipped = bytearray(content)
        flipped[-place] ^= 1 << (place % 8)
        shard.write_bytes(flipped)
        with pytest.raises(UserError, match=r"part-00000\.parquet footer: damaged"):
            _read_all(damaged)


def test_a_single_flipped_bit_is_never_trained_on(damaged: Path, dataset: str) -> None:
    """The checksums of the manifest see what the decoder would read as other numbers."""
    shard = damaged / "train/part-00000.parquet"
    content = shard.read_bytes()
    clean = [
        batch.users.tolist() + batch.items.tolist() for batch in train_stream(dataset).batches(0)
    ]
    for position in range(4, len(content) - 8, len(content) // 60):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        shard.write_bytes(flipped)
        try:
            read = [
                batch.users.tolist() + batch.items.tolist()
                for batch in train_stream(str(damaged)).batches(0)
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
