"""Each shift changes what it says that it changes."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cnsdiff_dist.prepare.shifts import share
from tests.support.preparing import prepare, raw_pairs, skewed_log, write_parquet


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    pq.write_table(skewed_log(rows=6000, users=400), path)
    return path


def item_counts(pairs: list[tuple[object, object]], items: int = 80) -> np.ndarray:
    return np.bincount([int(str(item)) for _, item in pairs], minlength=items)


def spread(counts: np.ndarray) -> float:
    """The standard deviation of the items' counts in units of their mean."""
    return float(counts.std() / counts.mean())


def test_popularity_makes_items_about_equally_present(log: Path, tmp_path: Path) -> None:
    manifest = prepare(tmp_path / "out", "--log", log, "--shift", "popularity")
    counts = {
        name: item_counts(raw_pairs(tmp_path / "out", manifest, name))
        for name in ("train", "test_iid", "test_ood", "valid_ood")
    }
    assert spread(counts["test_iid"]) > 0.55
    assert spread(counts["test_ood"]) < 0.35
    assert spread(counts["valid_ood"]) < spread(counts["train"]) / 1.3
    # the IID test looks like train: the same items are popular
    assert np.corrcoef(counts["train"], counts["test_iid"])[0, 1] > 0.75


def test_temporal_tests_on_the_future(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(out, "--log", log, "--shift", "temporal")
    times = {
        name: pq.read_table(out / split.shards[0].path)["timestamp"].to_numpy()
        for name, split in manifest.splits.items()
    }
    past = ("train", "valid_iid", "valid_ood", "test_iid")
    assert times["test_ood"].min() > max(times[name].max() for name in past)
    # valid_ood is the latest of train but for the rows that keep a user or item in train
    assert np.median(times["train"]) < times["valid_ood"].min()
    assert (times["train"] > times["valid_ood"].min()).sum() < 0.02 * len(times["train"])
    assert abs(np.median(times["test_iid"]) - np.median(times["valid_iid"])) < 400


def test_random_changes_nothing(log: Path, tmp_path: Path) -> None:
    manifest = prepare(tmp_path / "out", "--log", log, "--shift", "random")
    pairs = [raw_pairs(tmp_path / "out", manifest, name) for name in ("train", "test_ood")]
    counts = [item_counts(pair) for pair in pairs]
    assert np.corrcoef(*counts)[0, 1] > 0.75


def test_exposure_validates_on_a_flatter_part_of_the_biased_log(log: Path, tmp_path: Path) -> None:
    users, items = np.arange(400), np.arange(400) % 80
    uniform = write_parquet(tmp_path / "uniform.parquet", user=users, item=items)
    out = tmp_path / "out"
    manifest = prepare(out, "--log", log, "--uniform", uniform)
    assert manifest.shift["kind"] == "exposure"
    given = set(zip(users.tolist(), items.tolist()))
    assert set(raw_pairs(out, manifest, "test_ood")) <= given
    counts = {
        name: item_counts(raw_pairs(out, manifest, name))
        for name in ("train", "valid_ood", "valid_iid")
    }
    assert spread(counts["valid_ood"]) < spread(counts["valid_iid"]) / 1.5


@pytest.mark.parametrize("shift", ["popularity", "temporal", "random"])
def test_another_seed_draws_other_rows(shift: str, log: Path, tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        manifest = prepare(tmp_path / str(seed), "--log", log, "--shift", shift, "--seed", seed)
        drawn.append(set(raw_pairs(tmp_path / str(seed), manifest, "test_iid")))
    assert len(drawn[0] & drawn[1]) < 0.5 * len(drawn[0])


def test_share_leaves_a_row() -> None:
    assert share(10, 0.2) == 2
    assert share(1, 0.9) == 0
    assert share(0, 0.5) == 0
    assert share(10, 0.0) == 0
