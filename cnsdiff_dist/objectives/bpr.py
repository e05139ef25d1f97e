"""Bayesian personalised ranking (Rendle et al., UAI 2009)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from cnsdiff_dist.objectives.protocol import Objective
from cnsdiff_dist.sections import Objective as Settings


class BPRSettings(Settings):
    kind: Literal["bpr"] = "bpr"


class BPR(Objective):
    """-log sigmoid(s_pos - s_neg), a mean over a row's negatives; 0 of a row without any."""

    settings_type = BPRSettings

    def __call__(self, positive_B: Tensor, negative_BN: Tensor) -> Tensor:
        loss_BN = functional.softplus(negative_BN - positive_B[:, None])  # softplus(-inf) is 0
        return loss_BN.sum(1) / (negative_BN > -torch.inf).sum(1).clamp(min=1)
