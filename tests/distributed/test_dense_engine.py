"""The DeepSpeed engine: every ZeRO stage trains alike, and its state is portable."""

from typing import Any

import pytest
import torch

from cnsdiff_dist.distributed.dense_engine import DenseEngine, State
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.models.denoiser import Denoiser
from cnsdiff_dist.sections import Generator
from tests.support.ranks import run_ranks

DIM, ROWS = 8, 16


def _engine(stage: Any, precision: Any = "fp32") -> DenseEngine:
    torch.manual_seed(0)
    config = Generator(zero_stage=stage, precision=precision, lr=0.01)
    return DenseEngine(Denoiser(DIM, 20, 16, 3, user=True), config, ROWS)


def _train(engine: DenseEngine, steps: int, first: int, world: World) -> list[float]:
    """Losses as means over the global batch, of which each rank has its part."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        z = torch.randn(ROWS, DIM, generator=generator)[world.rank :: world.size].requires_grad_()
        t = torch.randint(20, (ROWS,), generator=generator)[world.rank :: world.size]
        network: Any = engine.network
        with torch.no_grad():
            network(z, t, z, t % 3)  # sampling, in the middle of a training step
        loss = (network(z, t, z, t % 3) - 2 * z.detach()).square().mean()
        engine.backward(loss)
        assert z.grad is not None and z.grad.abs().sum() > 0  # the way into the tables is open
        engine.step()
        losses.append(world.sum(loss.detach()).item() / world.size)
    return losses


def _run(stage: int, precision: str, state: State | None) -> tuple[list[float], State]:
    world = join_world(60)
    engine = _engine(stage, precision)
    if state:
        engine.load_state(state)
    losses = _train(engine, 4, 4 if state else 0, world)
    return losses, engine.state()


@pytest.fixture(scope="module")
def reference(world: World) -> tuple[list[float], State, list[float]]:
    """8 steps at stage 0: the first 4 losses, the state there, the last 4 losses."""
    engine = _engine(0)
    first = _train(engine, 4, 0, world)
    return first, engine.state(), _train(engine, 4, 4, world)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_alike_and_resumes_exactly(
    stage: int, reference: tuple[list[float], State, list[float]]
) -> None:
    first, state, last = reference
    losses, own = _run(stage, "fp32", None)
    assert losses == pytest.approx(first, rel=1e-5)
    for name, entry in state.items():
        for key, value in entry.items():
            assert torch.allclose(own[name][key], value, atol=1e-6), (name, key)
    assert _run(stage, "fp32", state)[0] == pytest.approx(last, rel=1e-5)


def test_state_round_trip_is_bit_identical() -> None:
    _, state = _run(1, "fp32", None)
    engine = _engine(1)
    engine.load_state(state)
    for name, entry in engine.state().items():
        for key, value in entry.items():
            assert torch.equal(value, state[name][key]), (name, key)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_and_take_its_state(
    stage: int, reference: tuple[list[float], State, list[float]]
) -> None:
    first, state, last = reference
    for losses, _ in run_ranks(2, _run, stage, "fp32", None):
        assert losses == pytest.approx(first, rel=1e-4)
    for losses, _ in run_ranks(2, _run, stage, "fp32", state):
        assert losses == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(
    stage: int, reference: tuple[list[float], State, list[float]], world: World
) -> None:
    assert _run(stage, "bf16", None)[0] == pytest.approx(reference[0], rel=0.05)


def test_without_a_module_backward_still_reaches_the_tables() -> None:
    engine, leaf = DenseEngine(None, Generator(), ROWS), torch.ones(3, requires_grad=True)
    engine.backward(leaf.sum())
    engine.step()
    assert leaf.grad is not None and engine.network is None and engine.state() == {}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_gradients_are_clipped_to_their_bound(clip: float) -> None:
    torch.manual_seed(0)
    config = Generator(zero_stage=1, lr=0.01, gradient_clip=clip)
    engine = DenseEngine(Denoiser(DIM, 20, 16, 3, user=True), config, ROWS)
    z, t = torch.randn(ROWS, DIM), torch.arange(ROWS)
    network: Any = engine.network
    engine.backward(1e4 * network(z, t, z, t % 3).square().mean())
    engine.step()
    moments = [entry["exp_avg"].flatten() for entry in engine.state().values()]
    norm = torch.cat(moments).norm().item()  # Adam's first moment is a tenth of the gradient
    assert norm == pytest.approx(0.1, rel=1e-3) if clip else norm > 1
