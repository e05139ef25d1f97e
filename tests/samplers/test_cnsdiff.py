"""The CNSDiff sampler: its generator, its mixing, and the pool of a group."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models.diffusion import make_schedule, q_sample
from cnsdiff_dist.samplers.latent_diffusion import Standardiser, hardest
from cnsdiff_dist.samplers.pools import KnownPositives
from cnsdiff_dist.samplers.protocol import EncodedBatch
from cnsdiff_dist.training.components import make_sampler

CPU = torch.device("cpu")


def _positives(graph: GraphArrays, user: int) -> set[int]:
    return set(graph.user_items[graph.user_indptr[user] : graph.user_indptr[user + 1]].tolist())


def _batch(users: list[int], items: list[int], streams: int = 1) -> Batch:
    weight = np.ones(len(users), np.float32)
    return Batch(0, 0, list(range(streams)), np.array(users), np.array(items), weight, len(users))


def _config(**sections: dict[str, object]) -> Config:
    """The paper's form: a row sees its own negative only."""
    tree: dict[str, dict[str, object]] = {"model": {"dim": 8}, "negatives": {"share": "row"}}
    tree["generator"] = {
        "hidden": 64,
        "train_share": 1.0,
        "levels": (10, 14, 18),
        "condition": ("user", "environment"),
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return Config.model_validate(tree)


def _encoded(rows: int = 256, requires_grad: bool = False) -> EncodedBatch:
    """Positives that depend on their user and environment, plus noise: there is a lot to learn."""
    generator = torch.Generator().manual_seed(0)
    user = torch.randn(rows, 8, generator=generator)
    environment = torch.randint(3, (rows,), generator=generator)
    shift = torch.randn(3, 8, generator=generator)
    noise = 0.3 * torch.randn(rows, 8, generator=generator)
    positive = (
        0.05 * (user @ torch.randn(8, 8, generator=generator) + shift[environment] + noise) + 1
    )
    leaves = [user, positive, torch.randn(rows, 1, 8, generator=generator)]
    if requires_grad:
        leaves = [leaf.requires_grad_() for leaf in leaves]
    candidates = np.arange(rows)[:, None]
    batch = _batch([0] * rows, [0] * rows, streams=2)
    return EncodedBatch(
        batch,
        candidates,
        *leaves,
        positive_item_B=torch.from_numpy(batch.items),
        candidate_item_BM=torch.from_numpy(candidates),
        environment_B=environment,
        weight_B=torch.ones(rows),
        groups=2,
    )


def _draws(step: int = 0, rows: int = 256) -> Draws:
    return Draws((0, 0, step), [0, 1], rows // 2, CPU)


def test_the_denoiser_learns_and_beats_the_mean_predictor(
    tiny_graph: GraphArrays, world: World
) -> None:
    sampler = make_sampler(_config(), tiny_graph, 3, world)
    before = [p.clone() for p in sampler.network.parameters()]
    adam = torch.optim.Adam(sampler.network.parameters(), lr=0.003)
    errors = []
    for step in range(300):
        negatives = sampler.negatives(_encoded(), _draws(step), 0.5)
        adam.zero_grad()
        negatives.terms["diffusion"].mean().backward()
        adam.step()
        errors.append(negatives.observed["denoising_error"].mean().item())
    assert any(
        not torch.equal(a, b) for a, b in zip(before, sampler.network.parameters(), strict=True)
    )
    assert sum(errors[:5]) / 5 > 0.8  # untrained, it is no better than the mean (1.0)
    assert sum(errors[-20:]) / 20 < 0.5


def test_diffusion_gradients_stay_out_of_the_tables_unless_asked(
    tiny_graph: GraphArrays, world: World
) -> None:
    for detach in (True, False):
        encoded = _encoded(requires_grad=True)
        sampler = make_sampler(_config(generator={"detach": detach}), tiny_graph, 3, world)
        term = sampler.negatives(encoded, _draws(), 0.5).terms["diffusion"].sum()
        gradients = torch.autograd.grad(
            term,
            [encoded.user_BD, encoded.positive_BD, encoded.candidate_BMD],
            allow_unused=True,
            retain_graph=True,
        )
        assert (gradients[1] is None) == detach
        assert gradients[0] is None and gradients[2] is None
        assert all(
            g is not None for g in torch.autograd.grad(term, list(sampler.network.parameters()))
        )


def test_the_hard_part_has_no_gradient_and_the_random_part_has(
    tiny_graph: GraphArrays, world: World
) -> None:
    encoded = _encoded(requires_grad=True)
    sampler = make_sampler(_config(), tiny_graph, 3, world)
    negatives = sampler.negatives(encoded, _draws(), 0.5)
    gradients = torch.autograd.grad(
        negatives.vector_BND.sum(),
        [
            encoded.positive_BD,
            encoded.user_BD,
            encoded.candidate_BMD,
            *sampler.network.parameters(),
        ],
        allow_unused=True,
    )
    assert gradients[2] is not None and gradients[2].abs().sum() > 0
    assert all(g is None for index, g in enumerate(gradients) if index != 2)


def test_lambda_moves_from_random_to_hard(tiny_graph: GraphArrays, world: World) -> None:
    mix = {"mix_start": (1.0, 9.0), "mix_end": (9.0, 1.0)}
    sampler = make_sampler(_config(negatives=mix), tiny_graph, 3, world)
    encoded = _encoded()
    random = encoded.candidate_BMD
    distance = [
        (sampler.negatives(encoded, _draws(), progress).vector_BND - random).norm().item()
        for progress in (0.0, 0.5, 1.0)
    ]
    assert distance[0] < distance[1] < distance[2]


def test_generation_is_deterministic_given_its_noise(tiny_graph: GraphArrays, world: World) -> None:
    sampler = make_sampler(_config(), tiny_graph, 3, world)
    first, again = (sampler.negatives(_encoded(), _draws(5), 1.0).vector_BND for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, sampler.negatives(_encoded(), _draws(6), 1.0).vector_BND)


def test_condition_reaches_the_denoiser(tiny_graph: GraphArrays, world: World) -> None:
    network = make_sampler(_config(), tiny_graph, 3, world).network
    z, t = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    by_user = network(z, t, torch.eye(2, 8), torch.zeros(2, dtype=torch.int64))
    by_environment = network(z, t, torch.zeros(2, 8), torch.tensor([0, 1]))
    assert not torch.allclose(by_user[0], by_user[1])
    assert not torch.allclose(by_environment[0], by_environment[1])


def test_hardest_is_the_argmax_of_user_scores() -> None:
    candidates, user = torch.randn(3, 20, 8), torch.randn(20, 8)
    for row in range(20):
        scores = [float(candidates[level, row] @ user[row]) for level in range(3)]
        assert torch.equal(hardest(candidates, user)[row], candidates[int(np.argmax(scores)), row])


def test_standard_encoded_have_mean_zero_and_variance_one_over_valid_rows(world: World) -> None:
    encoded = _encoded()
    encoded.weight_B[200:] = 0
    encoded.positive_BD[200:] = 99.0  # pads must not count
    standard = Standardiser(encoded, torch.arange(256), world)
    z = standard.item(encoded.positive_BD[:200])
    assert z.mean(0).abs().max() < 1e-3
    assert torch.allclose(z.var(0, unbiased=False), torch.ones(8), atol=1e-2)
    assert torch.allclose(standard.unstandardised_item(z), encoded.positive_BD[:200], atol=1e-5)
    assert standard.user(encoded.user_BD[:200]).mean(0).abs().max() < 1e-3


@pytest.mark.parametrize("condition", [(), ("user",), ("environment",)])
def test_every_condition_works(
    tiny_graph: GraphArrays, world: World, condition: tuple[str, ...]
) -> None:
    sampler = make_sampler(_config(generator={"condition": condition}), tiny_graph, 3, world)
    assert torch.isfinite(sampler.negatives(_encoded(), _draws(), 0.5).vector_BND).all()


def _with_known_network(
    tiny_graph: GraphArrays, world: World, **sections: dict[str, object]
) -> tuple[Any, list[torch.Tensor]]:
    """A sampler whose denoiser predicts 0, the batch mean, and records what it is given."""
    sampler, seen = make_sampler(_config(**sections), tiny_graph, 3, world), []

    class Zero(torch.nn.Module):
        def forward(self, zt: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            seen.append(zt.clone())
            return zt * 0

    sampler.network = Zero()
    return sampler, seen


def test_hard_negatives_are_on_the_scale_of_the_encoded(
    tiny_graph: GraphArrays, world: World
) -> None:
    mix = {"mix_start": (1e6, 1.0), "mix_end": (1e6, 1.0)}
    sampler, _ = _with_known_network(tiny_graph, world, negatives=mix)
    encoded = _encoded()
    got = sampler.negatives(encoded, _draws(), 0.5).vector_BND[:, 0]
    mean = encoded.positive_BD.mean(0).expand_as(got)
    assert torch.allclose(got, mean, atol=1e-3) and mean.abs().min() > 0.1


def test_the_chain_starts_from_the_noisiest_level(tiny_graph: GraphArrays, world: World) -> None:
    sampler, seen = _with_known_network(tiny_graph, world)
    encoded, draws = _encoded(), _draws()
    sampler.negatives(encoded, _draws(), 0.5)
    draws.normal(8)  # of the training step
    z0 = Standardiser(encoded, torch.arange(256), world).item(encoded.positive_BD)
    t = torch.full((256,), 18 - 1)
    expected = q_sample(z0, t, draws.normal(8), make_schedule("cosine", 20))
    assert torch.allclose(seen[1], expected, atol=1e-5)  # seen[0] is the training step's


def test_both_parameters_of_lambda_move(tiny_graph: GraphArrays, world: World) -> None:
    mix = {"mix_start": (1.0, 9.0), "mix_end": (9.0, 1.0)}
    sampler = make_sampler(_config(negatives=mix), tiny_graph, 3, world)
    assert [sampler._mix_at(p) for p in (0.0, 0.5, 1.0)] == [(1, 9), (5, 5), (9, 1)]


def test_the_time_step_reaches_the_denoiser(tiny_graph: GraphArrays, world: World) -> None:
    network = make_sampler(_config(), tiny_graph, 3, world).network
    z, environment = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    out = network(z, torch.tensor([0, 19]), torch.zeros(2, 8), environment)
    assert not torch.allclose(out[0], out[1])


# --- pools of a group ---------------------------------------------------------------------


def test_known_positives_are_those_of_the_train_rows(tiny_graph: GraphArrays) -> None:
    users, items = np.array([0, 4, 3, 1, 0, 2]), np.array([0, 1, 0, 2, 1, 1])
    known = KnownPositives(tiny_graph)
    for _ in range(2):  # nothing is left behind by the first call
        got = known.of(users, items, groups=2)
        for row in range(6):
            pool = items[row // 3 * 3 : row // 3 * 3 + 3]
            assert got[row].tolist() == [i in _positives(tiny_graph, users[row]) for i in pool]


def test_a_shared_pool_holds_the_groups_positives_and_what_was_made_of_some(
    tiny_graph: GraphArrays, world: World
) -> None:
    shared = {"share": "group", "margin": None}
    sampler, _ = _with_known_network(
        tiny_graph,
        world,
        negatives=shared,
        generator={"levels": (10, 14), "train_share": 0.25},
        objective={"similarity": "dot"},
    )
    encoded = replace(_encoded(), candidate_BMD=torch.empty(256, 0, 8))
    encoded.weight_B[[3, 200]] = encoded.batch.weight[[3, 200]] = 0
    made = sampler.negatives(encoded, _draws(), 0.5)
    assert made.vector_BND.shape == (256, 0, 8) and made.pool is not None
    assert made.pool.vector_GPD.shape == (2, 128 + 2 * 32, 8)
    logits = made.logits(encoded.user_BD, cosine=False)
    some = [row for row in (*range(32), *range(128, 160)) if row != 3]
    mean = encoded.positive_BD[some].mean(0)  # what the known network generates
    assert 0 in _positives(tiny_graph, 0)  # every user and positive of the batch is 0
    for row in (0, 127, 128, 255):
        for column in range(192):
            source = row // 128 * 128 + (column - 128) % 32
            out = column < 128 or source == 3
            expected = -torch.inf if out else float(mean @ encoded.user_BD[row]) + math.log(4)
            assert logits[row, column].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_a_row_leaves_out_what_its_user_likes_nearly_as_much_as_the_positive(
    tiny_graph: GraphArrays, world: World, margin: float
) -> None:
    config = _config(
        negatives={"share": "group", "margin": margin},
        generator={"levels": (10, 14), "train_share": 0.25},
    )
    encoded = replace(_encoded(), candidate_BMD=torch.empty(256, 0, 8))
    made = make_sampler(config, tiny_graph, 3, world).negatives(encoded, _draws(), 0.5)
    assert made.pool is not None and made.hard_BD is not None
    cosine = torch.nn.functional.cosine_similarity
    for row in range(0, 256, 5):
        user = encoded.user_BD[row]
        bound = cosine(user, encoded.positive_BD[row], dim=0) - margin
        for column, vector in enumerate(made.hard_BD.view(2, 64, 8)[row // 128]):
            out = made.pool.offset_BP[row, 128 + column] == -torch.inf
            assert torch.equal(made.pool.vector_GPD[row // 128, 128 + column], vector)
            if abs(cosine(user, vector, dim=0) - bound) > 1e-5:
                assert out == (cosine(user, vector, dim=0) > bound)
    left_out = (made.pool.offset_BP[:, 128:] == -torch.inf).float().mean()
    assert 0.05 < left_out < 0.99


def test_the_generator_learns_from_a_share_of_each_group(
    tiny_graph: GraphArrays, world: World
) -> None:
    sampler = make_sampler(_config(generator={"train_share": 0.25}), tiny_graph, 3, world)
    term = sampler.negatives(_encoded(), _draws(), 0.5).terms["diffusion"].view(2, 128)
    assert (term[:, :32] > 0).all() and (term[:, 32:] == 0).all()
