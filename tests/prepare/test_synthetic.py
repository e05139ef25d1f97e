"""The synthetic dataset: its logs follow the known truth, which can be learned."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cnsdiff_dist.data.dataset import read_ids, read_split
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.synthetic import Synthetic, draw_interactions, draw_truth
from tests.support.preparing import all_files, prepare

SMALL = Synthetic(users=600, items=300, seed=3, biased_per_user=20.0)
EVERYONE = slice(0, SMALL.users)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    return out, prepare(out, "--synthetic")


def test_the_logs_have_the_wanted_size_and_share_no_pair() -> None:
    (users, items), (others, tried) = draw_interactions(SMALL, draw_truth(SMALL))
    assert abs(len(users) / (15 * SMALL.users) - 1) < 0.05  # a twentieth of 300 items
    assert not set(zip(users, items)) & set(zip(others, tried))
    assert max(users.max(), others.max()) < SMALL.users
    assert max(items.max(), tried.max()) < SMALL.items


def test_the_biased_log_follows_the_exposure_and_the_uniform_one_the_taste() -> None:
    truth = draw_truth(SMALL)
    (_, biased), (_, uniform) = draw_interactions(SMALL, truth)
    preference, exposure = truth.preference(EVERYONE), truth.exposure(EVERYONE)
    shown = np.bincount(biased, minlength=SMALL.items)
    tried = np.bincount(uniform, minlength=SMALL.items)
    assert np.corrcoef(shown, (preference * exposure).sum(0))[0, 1] > 0.95
    unseen_likes = (preference * (1 - exposure)).sum(0)
    assert np.corrcoef(tried, unseen_likes)[0, 1] > 0.5
    assert np.corrcoef(tried, truth.popularity)[0, 1] < 0.1


def test_popularity_is_a_confounder() -> None:
    truth = draw_truth(Synthetic())
    log_popularity = np.log(truth.popularity)
    assert np.corrcoef(truth.environment, log_popularity)[0, 1] > 0.7  # drives exposure
    assert 0.3 < np.corrcoef(truth.quality, log_popularity)[0, 1] < 0.8  # and goes with taste


def test_the_same_world_gives_the_same_bytes(tmp_path: Path) -> None:
    words = ["--synthetic", "--users", 80, "--items", 50, "--name", "same"]
    first, again = prepare(tmp_path / "a", *words), prepare(tmp_path / "b", *words)
    assert first == again
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")
    assert prepare(tmp_path / "c", *words, "--seed", 1).digest != first.digest


def test_too_small_a_world_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--users 1 --items 1: so small a world has no interact"):
        prepare(tmp_path / "out", "--synthetic", "--users", 1, "--items", 1)
    assert not (tmp_path / "out").exists()


def test_the_truth_is_written_beside(made: tuple[Path, Manifest]) -> None:
    truth = draw_truth(Synthetic())
    users = pq.read_table(made[0] / "truth/users.parquet")
    items = pq.read_table(made[0] / "truth/items.parquet")
    assert np.allclose(np.stack(users["factors"].to_pylist()), truth.user_factors)
    assert np.allclose(items["popularity"].to_numpy(), truth.popularity)
    model = pq.read_table(made[0] / "truth/model.parquet")
    assert model["offset"][0].as_py() == truth.offset


def recall(out: Path, manifest: Manifest, split: str, scores: np.ndarray) -> float:
    """Recall@20 with train items masked, mean over users."""
    graph = open_graph(str(out), manifest)
    owner = np.repeat(np.arange(manifest.users), np.diff(graph.user_indptr))
    scores = scores.copy()
    scores[owner, graph.user_items] = -np.inf
    users, items = read_split(str(out), manifest, split)
    rank = (scores[users] > scores[users, items][:, None]).sum(1)
    hits, rows = np.bincount(users, rank < 20), np.bincount(users)
    return float((hits[rows > 0] / rows[rows > 0]).mean())


def test_popularity_wins_in_distribution_and_taste_out_of_it(made: tuple[Path, Manifest]) -> None:
    out, manifest = made
    truth, graph = draw_truth(Synthetic()), open_graph(str(out), manifest)
    users = read_ids(str(out), manifest, "users")["id"].to_numpy()
    items = read_ids(str(out), manifest, "items")["id"].to_numpy()
    degree = np.diff(graph.item_indptr).astype(float)
    popular = np.tile(degree, (manifest.users, 1))
    taste = truth.preference(slice(None))[users][:, items]
    likely = taste * truth.exposure(slice(None))[users][:, items]
    assert recall(out, manifest, "test_ood", taste) > 5 * recall(out, manifest, "test_ood", popular)
    assert recall(out, manifest, "test_iid", popular) > 0.1
    assert recall(out, manifest, "test_iid", likely) > recall(out, manifest, "test_iid", taste)


def test_a_factorisation_learns_taste_from_the_biased_log(made: tuple[Path, Manifest]) -> None:
    out, manifest = made
    graph = open_graph(str(out), manifest)
    owner = np.repeat(np.arange(manifest.users), np.diff(graph.user_indptr))
    degree = np.diff(graph.item_indptr).astype(float)
    matrix = np.zeros((manifest.users, manifest.items))
    matrix[owner, graph.user_items] = degree[graph.user_items] ** -0.5
    left, scale, right = np.linalg.svd(matrix, full_matrices=False)
    learned = (left[:, :8] * scale[:8]) @ right[:8]
    popular = np.tile(degree, (manifest.users, 1))
    ours, theirs = (recall(out, manifest, "test_ood", scores) for scores in (learned, popular))
    assert ours > 3 * theirs
