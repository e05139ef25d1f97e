"""Top-K lists found by an index against the exact ones."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.evaluation.top_k import MASKED_SCORE, ExactSearch
from cnsdiff_dist.inference.faiss_search import ApproximateSearch, recall_sums
from tests.support.lists import read_lists
from tests.support.ranks import run_ranks

USERS, ITEMS, DIM, K = 60, 5000, 16, 10


def clustered(rows: int, seed: int) -> Tensor:
    """Vectors around a hundred centres, as those of embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(100, DIM, generator=torch.Generator().manual_seed(7))
    chosen = torch.randint(100, (rows,), generator=generator)
    return centre[chosen] + 0.5 * torch.randn(rows, DIM, generator=generator)


def masks() -> list[Interactions]:
    """Users who mask from no item to all but three, in two splits."""
    rng = np.random.default_rng(0)
    known = [rng.permutation(ITEMS)[:count] for count in [0, 5, 40, 700, ITEMS - 3] * (USERS // 5)]
    users = np.repeat(np.arange(USERS), [len(items) for items in known])
    items = np.concatenate(known)
    return [
        Interactions.from_pairs(users[items % 2 == odd], items[items % 2 == odd], (USERS, ITEMS))
        for odd in (0, 1)
    ]


def listed(found: tuple[Tensor, Tensor]) -> Any:
    """The items of the lists; -1 where there is none."""
    return found[1].masked_fill(found[0] <= MASKED_SCORE, -1).numpy()


@pytest.mark.parametrize("own", [range(ITEMS), range(1200, 3100), range(40, 45), range(9, 9)])
def test_all_of_the_exact_lists_is_the_exact_lists(own: range) -> None:
    user = clustered(USERS, 1)
    exact = ExactSearch(clustered(ITEMS, 2)[own.start : own.stop], own, masks(), K)
    search = ApproximateSearch(exact, 1.0)
    search._index.nprobe = search._index.nlist
    everyone = np.concatenate([np.arange(USERS - 2), [-1, -1]])  # the last places are empty
    wanted, found = exact(user, everyone), search(user, everyone)
    assert np.array_equal(listed(wanted)[:-2], listed(found)[:-2])
    there = wanted[0][:-2] > MASKED_SCORE
    assert torch.allclose(wanted[0][:-2][there], found[0][:-2][there], rtol=1e-4)


def test_some_of_the_lists_for_a_part_of_the_cells() -> None:
    exact = ExactSearch(clustered(ITEMS, 2), range(ITEMS), masks()[:1], K)
    found = {}
    for wanted in (0.5, 0.9):
        search = ApproximateSearch(exact, wanted)
        tuned = search.tune(clustered(USERS, 1), np.arange(USERS))
        other = clustered(USERS, 3)
        shares = [
            recall_sums(listed(lists), listed(exact(user, np.arange(USERS))))
            for lists, user in (
                (tuned, clustered(USERS, 1)),
                (search(other, np.arange(USERS)), other),
            )
        ]
        assert shares[0][0] >= wanted * shares[0][1] and shares[1][0] >= 0.8 * wanted * shares[1][1]
        found[wanted] = search._index.nprobe
        assert found[wanted] < search._index.nlist / 8 and not search.scores_all
    assert found[0.5] <= found[0.9]


def test_lists_are_full_whatever_is_masked() -> None:
    """For users who know all items near them, for users who know none, and for a long list."""
    item = clustered(ITEMS, 2)
    user = clustered(USERS, 1)
    near = (user @ item.t()).topk(600, dim=1).indices.numpy()
    known = [near[u, : [0, 30, 80, 600][u % 4]] for u in range(USERS)]
    row = np.repeat(np.arange(USERS), [len(items) for items in known])
    mask = [Interactions.from_pairs(row, np.concatenate(known), (USERS, ITEMS))]
    for k in (K, 200):
        exact = ExactSearch(item, range(ITEMS), mask, k)
        search, everyone = ApproximateSearch(exact, 0.5), np.arange(USERS)
        for found in (search.tune(user, everyone), search(user, everyone)):
            lists = listed(found)
            assert (lists >= 0).all()
            assert not any(np.isin(lists[u], known[u]).any() for u in range(USERS))
            assert (np.diff(found[0].numpy()) <= 0).all()
        assert not search.scores_all


@pytest.mark.parametrize(("every", "indexed"), [(2, True), (10, False)])
def test_users_who_are_served_exactly_do_not_count(every: int, indexed: bool) -> None:
    """An index is tuned on users who mask little, and not used if these are a minority."""
    item, user, everyone = clustered(ITEMS, 2), clustered(200, 1), np.arange(200)
    counts = np.where(everyone % every, 200, 5)
    known = [np.random.default_rng(u).permutation(ITEMS)[:count] for u, count in enumerate(counts)]
    mask = Interactions.from_pairs(np.repeat(everyone, counts), np.concatenate(known), (200, ITEMS))
    searches = [ApproximateSearch(ExactSearch(item, range(ITEMS), [mask], K), 0.97) for _ in "ab"]
    light = np.flatnonzero(counts == 5)
    searches[0].tune(user, everyone)
    searches[1].tune(user[light], everyone[light])
    assert searches[0].scores_all is not indexed and not searches[1].scores_all
    assert not indexed or searches[0]._index.nprobe == searches[1]._index.nprobe


def test_places_without_a_user_do_not_count() -> None:
    exact = ExactSearch(clustered(ITEMS, 2), range(ITEMS), masks()[:1], K)
    user, everyone = clustered(USERS, 1), np.arange(USERS)
    alone, padded = (ApproximateSearch(exact, 0.97) for _ in range(2))
    alone.tune(user, everyone)
    padded.tune(torch.cat([user, torch.zeros(USERS, DIM)]), np.r_[everyone, -np.ones(USERS, int)])
    assert padded._index.nprobe == alone._index.nprobe and not padded.scores_all


def test_where_an_index_does_not_pay_every_item_is_scored() -> None:
    generator = torch.Generator().manual_seed(0)
    user, item = (torch.randn(n, DIM, generator=generator) for n in (USERS, ITEMS))
    exact = ExactSearch(item, range(ITEMS), masks(), K)
    search, everyone = ApproximateSearch(exact, 0.99), np.arange(USERS)
    wanted = exact(user, everyone)
    for found in (search.tune(user, everyone), search(user, everyone)):
        assert torch.equal(found[1], wanted[1])
    assert search.scores_all


def test_recall_counts_the_items_of_the_exact_lists() -> None:
    exact, found = np.array([[1, 2, 3], [4, 5, -1]]), np.array([[3, 9, 1], [5, -1, -1]])
    assert recall_sums(found, exact) == (3, 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("approximate")
    words = ["--synthetic", "--users", "1501", "--items", "3001"]
    assert main(["prepare", str(folder / "data"), *words]) == 0
    (folder / "config.yaml").write_text(
        f"data: {{url: {folder / 'data'}, streams: 2}}\nrun: {{dir: {folder / 'run'}}}\n"
        "model: {dim: 8, layers: 1}\ntrain: {batch: 1024, epochs: 2, select_split: valid_ood}\n"
    )
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


def test_recommend_says_what_share_it_found(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recommend", str(run), str(tmp_path / "r"), "--k", "5"]
    assert main([*words, "--approximate", "0.6"]) == 0
    record = json.loads((tmp_path / "r/_SUCCESS").read_text())
    recall = record["recall"]
    assert record["scores_all"] == 0 and 0.5 < recall < 1
    assert f"recall of the exact lists {recall:.3f}\n" in capsys.readouterr().out
    assert main(["recommend", str(run), str(tmp_path / "exact"), "--k", "5"]) == 0
    pairs = [
        {(row["user"], row["item"]) for row in pq.read_table(tmp_path / out).to_pylist()}
        for out in ("r", "exact")
    ]
    assert len(pairs[0]) == len(pairs[1])
    assert len(pairs[0] & pairs[1]) / len(pairs[1]) == pytest.approx(recall, abs=0.1)
    assert main([*words, "--approximate", "1"]) == 0
    assert "(an index would not pay: all were scored)" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.parametrize("wanted", ["0.6", "1"])
def test_on_two_ranks_the_lists_are_merged(run: Path, tmp_path: Path, wanted: str) -> None:
    words = ["recommend", str(run), str(tmp_path / "two"), "--k", "5", "--approximate", wanted]
    assert run_ranks(2, main, words) == [0, 0]
    assert main(["recommend", str(run), str(tmp_path / "one"), "--k", "5"]) == 0
    one, two = (
        {user: {item for item, _ in found} for user, found in read_lists(tmp_path / out).items()}
        for out in ("one", "two")
    )
    hits = sum(len(one[user] & two[user]) for user in one)
    assert hits > (float(wanted) - 0.1) * 5 * len(one) and set(one) == set(two)


@pytest.mark.parametrize("value", ["0", "1.5", "nan"])
def test_what_is_no_share_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "nowhere", "r", "--approximate", value]) == 2
    assert "more than 0, at most 1" in capsys.readouterr().err


def test_without_faiss_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main(["recommend", "nowhere", "r", "--approximate", "0.9"]) == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err
