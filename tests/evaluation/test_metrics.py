"""Metrics against a brute-force computation of each, user by user."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.evaluation.metrics import RankingSums
from cnsdiff_dist.evaluation.top_k import ExactSearch, top_k, top_k_lists

KS = (2, 5)


def _brute(ranked: list[int], relevant: set[int], k: int) -> dict[str, float]:
    hits = [item in relevant for item in ranked[:k]]
    ideal = sum(1 / math.log2(r + 2) for r in range(min(k, len(relevant))))
    return {
        "recall": sum(hits) / len(relevant),
        "ndcg": sum(h / math.log2(r + 2) for r, h in enumerate(hits)) / ideal,
        "hit": float(any(hits)),
        "precision": sum(hits) / k,
    }


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(5, 30), st.floats(0.02, 0.6))
def test_metrics_equal_brute_force(seed: int, users: int, items: int, density: float) -> None:
    generator = np.random.default_rng(seed)
    relevant = generator.random((users, items)) < density
    relevant[0, 0] = True
    environment, degree = generator.integers(3, size=items), generator.integers(1, 9, size=items)
    ranked = np.argsort(generator.random((users, items)), axis=1)[:, : max(KS)]
    split = Interactions.from_pairs(*np.nonzero(relevant), (users, items))
    # Two ranks, each with half of the users and of the items that it counts.
    halves = [RankingSums(KS, 3, degree[: items // 2]), RankingSums(KS, 3, degree[items // 2 :])]
    counted = [u for u in range(users) if relevant[u].any()]
    for sums, chunk, first in zip(halves, np.array_split(np.arange(users), 2), (0, items // 2)):
        row, item = split.of(chunk)
        sums.add_users(ranked[chunk], row, item, environment[item], items)
        sums.add_recommendations(ranked[counted] - first)
    sums.load_vector(halves[0].to_vector() + halves[1].to_vector())
    result, parts = sums.result(items), sums.by_environment()
    for k in KS:
        wanted = [_brute(list(ranked[u]), set(np.flatnonzero(relevant[u])), k) for u in counted]
        for name in wanted[0]:
            assert result[f"{name}@{k}"] == pytest.approx(np.mean([w[name] for w in wanted]))
        shown = ranked[counted, :k]
        assert result[f"coverage@{k}"] == pytest.approx(len(np.unique(shown)) / items)
        assert result[f"popularity@{k}"] == pytest.approx(degree[shown].mean())
        for e in range(3):
            inside = relevant & (environment == e)
            rows = [u for u in range(users) if inside[u].any()]
            assert parts[e]["users"] == len(rows)
            for name in ("recall", "ndcg", "hit", "precision"):
                wanted_e = [
                    _brute(list(ranked[u]), set(np.flatnonzero(inside[u])), k)[name] for u in rows
                ]
                assert parts[e][f"{name}@{k}"] == pytest.approx(np.mean(wanted_e) if rows else 0)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3000), st.integers(1, 30))
def test_top_k_by_buckets_is_exact(seed: int, rows: int, columns: int, k: int) -> None:
    score = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values, indices = top_k(score, k)
    expected = torch.sort(score, dim=1, descending=True).values[:, : min(k, columns)]
    assert torch.equal(values, expected)
    assert torch.equal(score.gather(1, indices), expected)


def test_ranking_masks_and_orders_like_a_plain_sort(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    user, item = torch.randn(9, 4, generator=generator), torch.randn(300, 4, generator=generator)
    seen = np.random.default_rng(0).random((9, 300)) < 0.3
    masks = [
        Interactions.from_pairs(*np.nonzero(part), (9, 300))
        for part in (seen & (np.arange(300) % 2 == 0), seen & (np.arange(300) % 2 == 1))
    ]
    search = ExactSearch(item, range(300), masks, 7)
    chunks = list(top_k_lists(user, np.array([0, 1, 4, 8]), search, 3, 9, world))
    assert [len(found.users) for found in chunks] == [3, 1]
    for found in chunks:
        for u, row_scores, row_items in zip(found.users, found.scores, found.items, strict=True):
            full = (item @ user[u]).numpy()
            full[seen[u]] = -np.inf
            best = np.argsort(-full)[:7]
            assert row_items.tolist() == best.tolist()
            assert row_scores == pytest.approx(full[best], rel=1e-5)
