"""Sampled softmax (Bengio & Senécal, AISTATS 2003)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cnsdiff_dist.objectives.protocol import Objective
from cnsdiff_dist.sections import Objective as Settings


class SoftmaxSettings(Settings):
    kind: Literal["softmax"] = "softmax"


class Softmax(Objective):
    """-log(e^pos / (e^pos + sum e^neg))."""

    settings_type = SoftmaxSettings

    def __call__(self, positive_B: Tensor, negative_BN: Tensor) -> Tensor:
        loss_B: Tensor = _SampledSoftmax.apply(positive_B, negative_BN)  # type: ignore[no-untyped-call]
        return loss_B


class _SampledSoftmax(torch.autograd.Function):
    """The softmax with its own gradient, so that each exponential is taken once.

    d loss / d s_j is the softmax's p_j, which is finite also where no negative is left.
    """

    @staticmethod
    def forward(ctx: Any, positive_B: Tensor, negative_BN: Tensor) -> Tensor:
        top_B = torch.maximum(positive_B, negative_BN.amax(1))
        # exp of -inf takes a slow path on CPUs: it costs 17 times as much as exp2 of -inf.
        part_BN = (negative_BN - top_B[:, None]).mul_(math.log2(math.e)).exp2_()
        own_B = (positive_B - top_B).exp()
        mass_B = part_BN.sum(1) + own_B
        ctx.save_for_backward(part_BN, own_B, mass_B)
        return mass_B.log() + top_B - positive_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, Tensor]:
        part_BN, own_B, mass_B = ctx.saved_tensors
        scale_B = grad_B / mass_B
        return own_B * scale_B - grad_B, part_BN * scale_B[:, None]
