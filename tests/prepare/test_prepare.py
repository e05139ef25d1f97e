"""`cnsdiff prepare` on real files: formats, splits, ids, determinism."""

import gzip
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import read_ids, read_split
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.data.schema import SPLITS, Manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare import shards as shard_writer
from tests.support.preparing import (
    NOTHING_CUT,
    all_files,
    prepare,
    raw_pairs,
    skewed_log,
    write_parquet,
)


def write_format(kind: str, folder: Path, table: pa.Table) -> tuple[Path, list[str]]:
    """Write the user, item and rating columns in a format; the file and the options it needs."""
    plain, rows = table.select(["user", "item", "rating"]), folder / "log"
    if kind == "parquet":
        pq.write_table(plain, rows.with_suffix(".parquet"))
        return rows.with_suffix(".parquet"), []
    if kind == "csv, gzip":
        path = rows.with_suffix(".csv.gz")
        with gzip.open(path, "wb") as file:
            pacsv.write_csv(plain, file)
        return path, []
    lines = [" ".join(map(str, row.values())) for row in plain.to_pylist()]
    header = {"tsv": "user item rating", "inter": "user_id:token item_id:token rating:float"}
    text = "\n".join([header[kind], *lines] if kind in header else lines) + "\n"
    delimiter = {"triples": " ", "headless": ","}.get(kind, "\t")
    suffix = {"triples": ".txt", "headless": ".dat", "tsv": ".txt"}.get(kind, f".{kind}")
    path = rows.with_suffix(suffix)
    path.write_text("\ufeff" + text.replace(" ", delimiter).replace("\n", "\r\n"), "utf-8")
    return path, ["--columns", "user,item,rating"] if kind == "headless" else []


@pytest.mark.parametrize("kind", ["csv, gzip", "tsv", "inter", "triples", "headless"])
def test_every_format_gives_the_same_dataset(kind: str, tmp_path: Path) -> None:
    words = ["--shift", "popularity", "--min-rating", "2"]
    made = []
    for name in ("parquet", kind):
        folder = tmp_path / name
        folder.mkdir()
        path, options = write_format(name, folder, skewed_log())
        made.append(prepare(folder / "out", "--log", path, *words, *options))
    assert made[0] == made[1]


def check_whole(out: Path, manifest: Manifest, rows_in: int) -> None:
    """Check what holds for every dataset: no row lost, disjoint splits, ids that fit the graph."""
    pairs = {name: raw_pairs(out, manifest, name) for name in manifest.splits}
    assert sum(map(len, pairs.values())) + sum(manifest.dropped.values()) == rows_in
    everything = [pair for split in pairs.values() for pair in split]
    assert len(set(everything)) == len(everything)

    users, items = read_split(str(out), manifest, "train")
    graph = open_graph(str(out), manifest)
    by_user = np.lexsort((items, users))
    by_item = np.lexsort((users, items))
    assert (graph.user_items == items[by_user]).all()
    assert (graph.item_users == users[by_item]).all()
    ids = [read_ids(str(out), manifest, side).to_pydict() for side in ("users", "items")]
    for table, indptr in zip(ids, (graph.user_indptr, graph.item_indptr)):
        assert table["row"] == list(range(len(indptr) - 1))
        assert table["degree"] == np.diff(indptr).tolist()
        assert min(table["degree"]) > 0
        assert table["id"] == sorted(table["id"])
    environments = manifest.environment_of(np.array(ids[1]["degree"]))
    assert ids[1]["environment"] == environments.tolist()
    assert set(environments) == set(range(manifest.environments))


@pytest.mark.parametrize("shift", ["popularity", "temporal", "random"])
def test_a_log_is_split_without_loss(shift: str, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(out, "--log", log, "--shift", shift, "--min-rating", 2)
    check_whole(out, manifest, skewed_log().num_rows)
    assert set(manifest.splits) == set(SPLITS)
    positives = sum(split.rows for split in manifest.splits.values()) + manifest.dropped["cold"]
    cold_future = manifest.dropped["cold"] if shift == "temporal" else 0
    assert manifest.splits["test_ood"].rows + cold_future == round(0.2 * positives)
    assert manifest.columns == ["user", "item", "timestamp"]


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 5), st.integers(0, 9)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(["popularity", "temporal", "random"]),
)
def test_small_and_ragged_logs(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]], shift: str
) -> None:
    folder = tmp_path_factory.mktemp("small")
    columns = dict(zip(("user", "item", "rating", "timestamp"), map(list, zip(*rows))))
    log = write_parquet(folder / "log.parquet", **columns)
    words = ["--shift", shift, "--min-rating", 1, "--duplicates", "drop"]
    first_rating: dict[tuple[int, int], int] = {}
    for user, item, rating, _ in rows:
        first_rating.setdefault((user, item), rating)
    if max(first_rating.values()) == 0:
        with pytest.raises(UserError, match="no train row is left"):
            prepare(folder / "out", "--log", log, *words)
        return
    manifest = prepare(folder / "out", "--log", log, *words)
    check_whole(folder / "out", manifest, len(rows))


def test_ready_splits_stay_as_they_are(tmp_path: Path) -> None:
    files = {
        "train": [("b", 2), ("a", 1), ("b", 10), ("a", 10)],
        "valid-iid": [("a", 2)],
        "test-ood": [("b", 1)],
    }
    words = []
    for split, pairs in files.items():
        path = tmp_path / f"{split}.csv"
        path.write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in pairs))
        words += [f"--{split}", path]
    out = tmp_path / "out"
    manifest = prepare(out, *words, "--valid-ood-fraction", 0)
    for split, pairs in files.items():
        assert sorted(raw_pairs(out, manifest, split.replace("-", "_"))) == sorted(pairs)
    assert set(manifest.splits) == {"train", "valid_iid", "test_ood"}
    assert read_ids(str(out), manifest, "items")["id"].to_pylist() == [1, 2, 10]  # as numbers
    assert manifest.shift["kind"] == "given"


def test_cuts_from_ready_train_never_empty_a_user_or_item(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(out, "--train", log, "--valid-fraction", 0.5, "--valid-ood-fraction", 0.5)
    check_whole(out, manifest, skewed_log().num_rows)
    assert set(manifest.splits) == {"train", "valid_iid", "valid_ood"}
    assert manifest.dropped["cold"] == 0
    table = skewed_log()
    assert manifest.users == len(table["user"].unique())
    assert manifest.items == len(table["item"].unique())


def test_uniform_log_becomes_the_test_without_what_train_has_shown(tmp_path: Path) -> None:
    biased = write_parquet(
        tmp_path / "b.parquet", user=[1, 1, 2, 2], item=[1, 2, 1, 2], rating=[5, 1, 5, 4]
    )
    uniform = write_parquet(
        tmp_path / "u.parquet", user=[1, 1, 2, 9], item=[2, 3, 3, 1], rating=[5, 5, 5, 5]
    )
    out = tmp_path / "out"
    words = ["--min-rating", 4, "--test-fraction", 0, *NOTHING_CUT]
    manifest = prepare(out, "--log", biased, "--uniform", uniform, *words)
    # (1, 2) was shown in the biased log, though not liked there; item 3 and user 9 are unknown.
    assert manifest.dropped == {
        "duplicate": 0,
        "in_other_split": 1,
        "below_min_rating": 1,
        "cold": 3,
    }
    assert sorted(raw_pairs(out, manifest, "train")) == [(1, 1), (2, 1), (2, 2)]
    assert "test_ood" not in manifest.splits


def test_unknown_rows_can_be_dropped(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", user=[1, 2], item=[1, 2])
    test = write_parquet(tmp_path / "test.parquet", user=[1, 3], item=[2, 2])
    words = ["--train", train, "--test-iid", test, *NOTHING_CUT]
    with pytest.raises(UserError, match=r"test.parquet: row 2: user 3 is not in train"):
        prepare(tmp_path / "out", *words)
    manifest = prepare(tmp_path / "out", *words, "--unknown", "drop")
    assert manifest.dropped["cold"] == 1
    assert raw_pairs(tmp_path / "out", manifest, "test_iid") == [(1, 2)]


def test_timestamps_keep_their_last_digit(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,ts\n1,1,1700000000000000001\n1,2,1700000000000000002\n2,1,1e9\n")
    out = tmp_path / "out"
    manifest = prepare(out, "--train", path, *NOTHING_CUT)
    shard = pq.read_table(out / manifest.splits["train"].shards[0].path)
    assert sorted(shard["timestamp"].to_pylist()) == [
        1_000_000_000,
        1_700_000_000_000_000_001,
        1_700_000_000_000_000_002,
    ]


def test_the_bytes_do_not_depend_on_threads(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = duckdb.connect
    made = []
    for threads in (1, 4):

        def limited(path: str, threads: int = threads) -> duckdb.DuckDBPyConnection:
            return connect(path, config={"threads": threads})

        monkeypatch.setattr(duckdb, "connect", limited)
        out = tmp_path / str(threads)
        prepare(out, "--log", log, "--shift", "popularity", "--name", "same")
        made.append(all_files(out))
    assert made[0] == made[1]


def test_seed_and_data_change_the_digest_and_the_name_does_not(log: Path, tmp_path: Path) -> None:
    words = ["--log", log, "--shift", "random", "--overwrite"]
    first = prepare(tmp_path / "out", *words)
    assert prepare(tmp_path / "out", *words, "--name", "other").digest == first.digest
    assert prepare(tmp_path / "out", *words, "--seed", 1).digest != first.digest
    assert prepare(tmp_path / "out", *words, "--environments", 2).digest != first.digest


def test_train_is_shuffled_into_representative_blocks(tmp_path: Path) -> None:
    users = np.repeat(np.arange(1000), 4)
    items = np.tile(np.arange(4), 1000)
    log = write_parquet(tmp_path / "log.parquet", user=users, item=items)
    manifest = prepare(tmp_path / "out", "--train", log, *NOTHING_CUT)
    stored, _ = read_split(str(tmp_path / "out"), manifest, "train")
    block_means = stored.reshape(8, 500).mean(axis=1)
    assert (abs(block_means - users.mean()) < 60).all()  # 5 standard errors


def test_large_splits_are_cut_into_groups_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_ROWS", 2 * shard_writer.ROW_GROUP)
    rows = 3 * shard_writer.ROW_GROUP + 5
    log = write_parquet(tmp_path / "log.parquet", user=np.arange(rows) % 997, item=np.arange(rows))
    manifest = prepare(tmp_path / "out", "--train", log, *NOTHING_CUT)
    group = shard_writer.ROW_GROUP
    shards = manifest.splits["train"].shards
    assert [shard.row_groups for shard in shards] == [[group, group], [group, 5]]
    for shard in shards:
        metadata = pq.read_metadata(tmp_path / "out" / shard.path)
        stored = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        assert stored == shard.row_groups


def test_several_logs_by_a_glob(log: Path, tmp_path: Path) -> None:
    table = skewed_log()
    for part in range(3):
        pq.write_table(table.slice(part * 1000, 1000), tmp_path / f"part-{part}.parquet")
    words = ["--shift", "random"]
    parts = prepare(tmp_path / "parts", "--log", tmp_path / "part-*.parquet", *words)
    whole = prepare(tmp_path / "whole", "--log", log, *words)
    assert parts.digest == whole.digest


def test_remote_logs_and_output(log: Path, tmp_path: Path) -> None:
    storage.write_bytes("memory://raw/log.parquet", log.read_bytes())
    words = ["--shift", "temporal", "--name", "same"]
    remote = prepare("memory://made", "--log", "memory://raw/*.parquet", *words)
    assert remote == prepare(tmp_path / "out", "--log", log, *words)
    names = storage.list_files("memory://made")
    assert names == sorted(all_files(tmp_path / "out"))
    with pytest.raises(UserError, match="a dataset is here"):
        prepare("memory://made", "--log", log, *words)
    open_graph("memory://made", remote)


def test_a_spilling_log_larger_than_the_memory_limit(tmp_path: Path) -> None:
    rows = 400_000
    users = np.arange(rows) // 8
    log = write_parquet(
        tmp_path / "log.parquet", user=users, item=(np.arange(rows) * 7919) % 50_021
    )
    words = ["--log", log, "--shift", "random", "--name", "same"]
    tight = prepare(tmp_path / "tight", *words, "--memory-limit", "48MB")
    assert tight.digest == prepare(tmp_path / "wide", *words).digest
    assert sum(split.rows for split in tight.splits.values()) == rows
