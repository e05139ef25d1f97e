"""Each objective against its formula written again, row by row, in plain Python."""

import math

import pytest
import torch

from cnsdiff_dist.objectives.bpr import BPR, BPRSettings
from cnsdiff_dist.objectives.registry import OBJECTIVES
from cnsdiff_dist.objectives.softmax import Softmax, SoftmaxSettings

B = 12


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_bpr_is_minus_log_sigmoid_of_the_margin() -> None:
    positive, negative = torch.randn(B), torch.randn(B, 3)
    negative[0, 1] = negative[1] = -torch.inf  # one left out; all left out
    expected = [
        sum(-math.log(1 / (1 + math.exp(-(p - n)))) for n in row if n > -math.inf)
        / max(sum(n > -math.inf for n in row), 1)
        for p, row in zip(positive.tolist(), negative.tolist(), strict=True)
    ]
    assert BPR(BPRSettings())(positive, negative).tolist() == pytest.approx(expected, rel=1e-5)


def test_sampled_softmax_is_minus_the_log_of_the_positives_share() -> None:
    positive, negative = torch.randn(B, requires_grad=True), torch.randn(B, 3)
    negative[0, 1] = negative[1] = -torch.inf
    expected = [
        -math.log(math.exp(p) / (math.exp(p) + sum(math.exp(n) for n in row)))
        for p, row in zip(positive.tolist(), negative.tolist(), strict=True)
    ]
    loss = Softmax(SoftmaxSettings())(positive, negative)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    loss.sum().backward()
    assert torch.isfinite(positive.grad).all()


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_what_is_left_out_moves_nothing(kind: str) -> None:
    """A negative with a logit of -inf changes neither the loss of a row nor its gradient."""
    objective = OBJECTIVES[kind](OBJECTIVES[kind].settings_type())
    positive, negative = torch.randn(B), torch.randn(B, 4)
    more = torch.cat([negative, torch.full((B, 3), -torch.inf)], dim=1).requires_grad_()
    few = negative.clone().requires_grad_()
    assert torch.allclose(objective(positive, more), objective(positive, few))
    for logits in (more, few):
        objective(positive, logits).sum().backward()
    assert torch.allclose(more.grad[:, :4], few.grad) and (more.grad[:, 4:] == 0).all()
