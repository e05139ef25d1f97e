"""Keeps numbers that are not finite out of the tables, the checkpoints and the evaluations."""

from typing import Any

import torch
from torch import Tensor

from cnsdiff_dist.checkpoint.state import local_tensors
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError


class FiniteGate:
    """Keeps a step whose loss or gradient is not finite out of the tables.

    FBGEMM updates the tables inside backward, so the gate is a hook on the gradient of the
    looked-up rows, [V, D]. All ranks learn there whose loss or gradient is bad, and then pass a
    gradient of zeros on, which moves no row under SGD and Adagrad. Set ``loss`` before backward;
    ``bad_ranks`` tells afterwards.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.loss = torch.zeros(())
        self.bad_ranks: list[int] = []

    def __call__(self, gradient_VD: Tensor) -> Tensor:
        total = gradient_VD.sum() + self.loss
        flags = self._world.gather((~torch.isfinite(total)).float())
        self.bad_ranks = flags.nonzero().flatten().tolist()
        return torch.zeros_like(gradient_VD) if self.bad_ranks else gradient_VD


def refuse_non_finite(state: dict[str, Any], world: World, step: int) -> None:
    """Refuse to evaluate or save a checkpoint tree with a number that is not finite. Collective.

    Raises:
        UserError: on every rank, when a parameter of one of them is not finite.
    """
    # A sum is not finite when a term is not, and needs no array of the table's size.
    bad = sum((~torch.isfinite(tensor.sum())).float() for tensor in local_tensors(state))
    if world.sum(torch.as_tensor(bad, device=world.device)) > 0:
        raise diverged("a parameter is not a finite number", step)


def diverged(what: str, step: int) -> UserError:
    """The error of a training that cannot go on."""
    return UserError(
        f"training diverged: {what} at step {step}; lower tables.lr or generator.lr "
        "(earlier checkpoints are good)"
    )
