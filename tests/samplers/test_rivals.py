"""Each rival sampler against its rule, written out as loops; the same when it is resumed."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from cnsdiff_dist.config import Config, parse_config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.samplers.dens import DENSSampler
from cnsdiff_dist.samplers.latent_diffusion import hardest
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives, Sampler
from cnsdiff_dist.samplers.registry import SAMPLERS
from cnsdiff_dist.training.components import make_sampler
from tests.support.small import graph_of

KINDS = list(SAMPLERS)
STREAMS, WIDTH, DIM, M = 2, 6, 8, 5
ROWS = STREAMS * WIDTH


@pytest.fixture(scope="module")
def graph() -> GraphArrays:
    pairs = np.random.default_rng(0).integers(0, [9, 20], (60, 2))
    return graph_of(sorted({(int(u), int(i)) for u, i in pairs}), 9, 20)


def _config(**negatives: object) -> Config:
    """Keys that the kind does not have are left out."""
    keys = SAMPLERS[str(negatives.get("kind", "cnsdiff"))].settings_type.model_fields
    wanted = {"candidates": M, "top": 2, **negatives}
    tree = {
        "model": {"dim": DIM},
        "generator": {"hidden": 16, "levels": (10, 14, 18)},
        "negatives": {key: value for key, value in wanted.items() if key in keys},
    }
    return parse_config(tree, "test")


def _batch() -> Batch:
    generator = np.random.default_rng(1)
    weight = np.ones(ROWS, np.float32)
    weight[-1] = 0
    users, items = generator.integers(0, 9, ROWS), generator.integers(0, 20, ROWS)
    return Batch(0, 0, list(range(STREAMS)), users, items, weight, ROWS - 1)


def _draws(step: int = 0) -> Draws:
    return Draws((0, 0, step), list(range(STREAMS)), WIDTH, torch.device("cpu"))


def _encoded(sampler: Sampler, draws: Draws) -> EncodedBatch:
    batch = _batch()
    candidates = sampler.candidates(batch, draws)
    generator = torch.Generator().manual_seed(3)
    item, user = (torch.randn(n, DIM, generator=generator) for n in (20, 9))
    return EncodedBatch(
        batch,
        candidates,
        user[batch.users],
        item[batch.items],
        item[candidates],
        positive_item_B=torch.from_numpy(batch.items),
        candidate_item_BM=torch.from_numpy(candidates),
        environment_B=torch.zeros(ROWS, dtype=torch.int64),
        weight_B=torch.from_numpy(batch.weight),
        groups=STREAMS,
    )


def _made(
    graph: GraphArrays, world: World, **negatives: object
) -> tuple[EncodedBatch, Negatives, Draws]:
    """What a sampler makes, and its draws as they were when it began to make it."""
    sampler = make_sampler(_config(**negatives), graph, 1, world)
    draws, same = _draws(), _draws()
    encoded = _encoded(sampler, draws)
    sampler.candidates(encoded.batch, same)
    return encoded, sampler.negatives(encoded, draws, 0.5), same


def _items(graph: GraphArrays, user: int) -> set[int]:
    return set(graph.user_items[graph.user_indptr[user] : graph.user_indptr[user + 1]].tolist())


def _score(encoded: EncodedBatch, row: int, column: int) -> float:
    return float(encoded.user_BD[row] @ encoded.candidate_BMD[row, column])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _picked(made: Negatives, encoded: EncodedBatch, row: int) -> int:
    """The column that a sampler of one negative chose; its vector is that candidate's."""
    assert made.item_BN is not None and made.item_BN.shape == (ROWS, 1)
    columns = [
        c
        for c in range(M)
        if torch.equal(made.vector_BND[row, 0], encoded.candidate_BMD[row, c])
        and encoded.candidates[row, c] == int(made.item_BN[row])
    ]
    assert columns
    return columns[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_negative_is_a_train_item_of_its_user(
    graph: GraphArrays, world: World, kind: str
) -> None:
    encoded, made, _ = _made(graph, world, kind=kind, count=3)
    logits = made.logits(encoded.user_BD, cosine=False)
    own = made.vector_BND.shape[1]
    for row in range(ROWS):
        mine = _items(graph, int(encoded.batch.users[row]))
        assert not mine & set(encoded.candidates[row].tolist())
        if made.item_BN is not None:
            assert not mine & set(made.item_BN[row].tolist())
        if made.pool is not None:
            for column in range(WIDTH):  # the group's positives come first in every pool
                source = row // WIDTH * WIDTH + column
                out = encoded.batch.items[source] in mine or encoded.weight_B[source] == 0
                assert (logits[row, own + column] == -torch.inf).item() == bool(out)


def test_dns_takes_the_hardest(graph: GraphArrays, world: World) -> None:
    encoded, made, _ = _made(graph, world, kind="dns")
    for row in range(ROWS):
        best = max(_score(encoded, row, c) for c in range(M))
        assert _score(encoded, row, _picked(made, encoded, row)) == best


def test_dns_mn_takes_each_of_the_top_n(graph: GraphArrays, world: World) -> None:
    sampler = make_sampler(_config(kind="dns_mn"), graph, 1, world)
    encoded = _encoded(sampler, _draws())
    seen: list[set[float]] = [set() for _ in range(ROWS)]
    for step in range(60):
        made = sampler.negatives(encoded, _draws(step), 0.5)
        for row in range(ROWS):
            seen[row].add(_score(encoded, row, _picked(made, encoded, row)))
    for row in range(ROWS):
        ranked = sorted((_score(encoded, row, c) for c in range(M)), reverse=True)
        assert seen[row] == set(ranked[:2])


def test_softmax_draws_by_the_exponential_of_the_score(graph: GraphArrays, world: World) -> None:
    encoded, made, draws = _made(graph, world, kind="softmax", rho=2.0)
    uniform = draws.uniform(1)[:, 0]
    for row in range(ROWS):
        mass = [math.exp(_score(encoded, row, c) / 2.0) for c in range(M)]
        column = 0
        while uniform[row] * sum(mass) > sum(mass[: column + 1]):
            column += 1
        wanted = encoded.candidates[row, column]
        assert made.item_BN is not None and int(made.item_BN[row]) == wanted


def test_mixgcf_picks_the_hardest_mixture(graph: GraphArrays, world: World) -> None:
    encoded, made, draws = _made(graph, world, kind="mixgcf")
    share = torch.from_numpy(draws.uniform(M)).float()
    for row in range(ROWS):
        mixtures = [
            share[row, c] * encoded.positive_BD[row]
            + (1 - share[row, c]) * encoded.candidate_BMD[row, c]
            for c in range(M)
        ]
        best = max(mixtures, key=lambda z: float(z @ encoded.user_BD[row]))
        assert torch.allclose(made.vector_BND[row, 0], best, atol=1e-6)


def test_ahns_comes_closest_to_the_wanted_score(graph: GraphArrays, world: World) -> None:
    encoded, made, _ = _made(graph, world, kind="ahns", hardness=0.8)
    for row in range(ROWS):
        positive = _sigmoid(float(encoded.user_BD[row] @ encoded.positive_BD[row]))
        gap = [abs(_sigmoid(_score(encoded, row, c)) - 0.8 / (positive + 1)) for c in range(M)]
        assert gap[_picked(made, encoded, row)] == pytest.approx(min(gap), abs=1e-6)


def test_srns_adds_the_deviation_over_subspaces(graph: GraphArrays, world: World) -> None:
    encoded, made, draws = _made(graph, world, kind="srns", hardness=3.0)
    kept = draws.uniform(5 * DIM).reshape(ROWS, 5, DIM) < 0.5
    user, positive = encoded.user_BD.numpy(), encoded.positive_BD.numpy()
    for row in range(ROWS):
        values = []
        for c in range(M):
            apart = encoded.candidate_BMD[row, c].numpy() - positive[row]
            likely = _sigmoid(float(user[row] @ apart))
            parts = [
                _sigmoid(2 * sum(float(user[row, d] * apart[d]) for d in range(DIM) if mask[d]))
                for mask in kept[row]
            ]
            values.append(likely + 3.0 * float(np.std(parts)))
        assert values[_picked(made, encoded, row)] == pytest.approx(max(values), abs=1e-5)


def test_no_more_can_be_on_top_than_there_are_candidates() -> None:
    with pytest.raises(UserError, match="at most all"):
        parse_config({"negatives": {"kind": "dns_mn", "candidates": 2, "top": 4}}, "test")


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_sampler_goes_on_as_if_never_stopped(
    graph: GraphArrays, world: World, kind: str
) -> None:
    """Checkpoints hold tables and network: a sampler may remember nothing else of its steps."""
    old, resumed = (make_sampler(_config(kind=kind), graph, 1, world) for _ in range(2))
    for step in range(3):
        draws = _draws(step)
        old.negatives(_encoded(old, draws), draws, step / 4)
    logits = []
    for sampler in (old, resumed):
        draws = _draws(3)
        encoded = _encoded(sampler, draws)
        made = sampler.negatives(encoded, draws, 0.75)
        logits.append(made.logits(encoded.user_BD, cosine=False))
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("in_batch", "dmns", "cnsdiff")])
def test_a_negative_that_is_an_item_carries_gradient_to_it(
    graph: GraphArrays, world: World, kind: str
) -> None:
    sampler, draws = make_sampler(_config(kind=kind), graph, 1, world), _draws()
    encoded = _encoded(sampler, draws)
    encoded.candidate_BMD.requires_grad_()
    made = sampler.negatives(encoded, draws, 0.5)
    (gradient,) = torch.autograd.grad(made.vector_BND.sum(), encoded.candidate_BMD)
    assert (gradient.abs().sum((1, 2)) > 0).all()


def test_dens_gates_are_trained_and_choose(graph: GraphArrays, world: World) -> None:
    sampler = make_sampler(_config(kind="dens"), graph, 1, world)
    assert isinstance(sampler, DENSSampler) and sampler.network is not None
    encoded = _encoded(sampler, _draws())
    made = sampler.negatives(encoded, _draws(), 0.25)
    _, gates = sampler.network(encoded.user_BD, encoded.positive_BD, encoded.candidate_BMD)
    for row in range(ROWS):
        values = []
        for c in range(M):
            candidate = encoded.candidate_BMD[row, c]
            score = encoded.user_BD[row] @ (0.75 * candidate - candidate * gates[row, c])
            values.append(score.item())
        assert values[_picked(made, encoded, row)] == pytest.approx(max(values), abs=1e-5)
    gradients = torch.autograd.grad(made.terms["gates"].sum(), list(sampler.network.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_dmns_keeps_every_level_and_knows_only_the_user(graph: GraphArrays, world: World) -> None:
    sampler = make_sampler(_config(kind="dmns"), graph, 1, world)
    encoded = _encoded(sampler, _draws())
    made = sampler.negatives(encoded, _draws(), 0.5)
    assert made.vector_BND.shape == (ROWS, 3, DIM) and made.offset_BN is not None
    assert made.offset_BN[0].tolist() == [0, -1, -2]
    vector_LBD = made.vector_BND.transpose(0, 1)
    assert torch.equal(made.hard_BD, hardest(vector_LBD, encoded.user_BD))
    assert sampler.network.user is not None and sampler.network.environment is None


def test_popularity_follows_the_power_of_the_degree(graph: GraphArrays, world: World) -> None:
    config = _config(kind="popularity", count=4000, gamma=0.5)
    sampler, batch = make_sampler(config, graph, 1, world), _batch()
    drawn = sampler.candidates(batch, _draws())
    degree = np.diff(graph.item_indptr)
    for row in (0, 7):
        absent = sorted(set(range(20)) - _items(graph, int(batch.users[row])))
        weight = degree[absent] ** 0.5
        expected = 4000 * weight / weight.sum()
        counts = np.bincount(drawn[row], minlength=20)[absent]
        assert (abs(counts - expected) < 5 * np.sqrt(expected) + 5).all()


def test_interacted_is_membership(graph: GraphArrays) -> None:
    users, items = (part.ravel() for part in np.meshgrid(np.arange(9), np.arange(20)))
    expected = [int(i) in _items(graph, int(u)) for u, i in zip(users, items, strict=True)]
    train = Interactions(graph.user_indptr, graph.user_items)
    assert train.contain(users, items).tolist() == expected


@pytest.mark.parametrize(("kind", "count"), [("in_batch", 0), ("mixed", 3)])
def test_in_batch_logits_lose_the_log_of_how_often_an_item_is_expected(
    graph: GraphArrays, world: World, kind: str, count: int
) -> None:
    encoded, plain, _ = _made(graph, world, kind=kind, count=max(count, 1))
    _, corrected, _ = _made(graph, world, kind=kind, count=max(count, 1), log_q=True)
    before = plain.logits(encoded.user_BD, cosine=False)
    after = corrected.logits(encoded.user_BD, cosine=False)
    degree = np.diff(graph.item_indptr)
    for row in range(ROWS):
        items = encoded.candidates[row].tolist() if count else []
        items += encoded.batch.items.reshape(STREAMS, WIDTH)[row // WIDTH].tolist()
        assert before.shape[1] == len(items)
        for column, item in enumerate(items):
            if before[row, column] == -torch.inf:
                assert after[row, column] == -torch.inf
                continue
            expected = WIDTH * degree[item] / degree.sum() + count / 20
            lost = float(before[row, column] - after[row, column])
            assert lost == pytest.approx(math.log(max(expected, 1e-12)), abs=1e-4)


def test_cosine_brings_synthetic_vectors_to_length_one(graph: GraphArrays, world: World) -> None:
    encoded, made, _ = _made(graph, world, kind="mixgcf")
    logits = made.logits(encoded.user_BD, cosine=True)[:, 0]
    unit = functional.normalize(made.vector_BND[:, 0], dim=1)
    assert torch.allclose(logits, (encoded.user_BD * unit).sum(1))


def test_the_published_denoiser_is_frozen_and_ignores_the_item(
    graph: GraphArrays, world: World
) -> None:
    """Its negatives have almost one direction, whatever they are made from."""
    sampler = make_sampler(_config(kind="cnsdiff_published"), graph, 1, world)
    assert sampler.network is None
    assert not any(p.requires_grad for p in sampler._denoiser.parameters())
    made = sampler.negatives(_encoded(sampler, _draws()), _draws(), 1.0)
    assert made.hard_BD is not None
    vectors = functional.normalize(made.hard_BD, dim=1)
    cosine = vectors @ vectors.t()
    assert (cosine.sum() - ROWS) / (ROWS * (ROWS - 1)) > 0.6
