"""CNSDiff: negatives synthesised in latent space by conditional diffusion.

Zhao et al., "Causal Negative Sampling via Diffusion Model for Out-of-Distribution
Recommendation", arXiv 2508.07243; docs/method.md says what differs here and why.

Shapes: B rows, G groups of W rows, S generated vectors of a group's pool, L noise levels.
"""

import math
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.samplers.candidates import uniform_candidates
from cnsdiff_dist.samplers.latent_diffusion import (
    LatentDiffusionSampler,
    hardest,
    rows_learned_from,
)
from cnsdiff_dist.samplers.pools import KnownPositives, batch_offsets
from cnsdiff_dist.samplers.protocol import (
    EncodedBatch,
    Footprint,
    Ids,
    Negatives,
    Pool,
    Surroundings,
    no_candidates,
)


class CNSDiffSettings(sections.Negatives):
    kind: Literal["cnsdiff"] = "cnsdiff"
    share: Literal["row", "group"] = Field(
        "group", description="who sees a generated negative; group: one pool with the positives"
    )
    margin: float | None = Field(
        0.3,
        description="group: a row leaves out generated vectors whose cosine with the user is "
        "above the positive's minus this; null for none",
    )
    mix_start: tuple[float, float] = Field(
        (3.0, 7.0), description="row: Beta(a, b) of lambda at first"
    )
    mix_end: tuple[float, float] = Field(
        (3.0, 7.0), description="row: Beta(a, b) of lambda at last"
    )

    @model_validator(mode="after")
    def _beta_is_positive(self) -> Self:
        if min(*self.mix_start, *self.mix_end) <= 0:
            raise ValueError("mix_start and mix_end are the parameters of a Beta: both above 0")
        return self


class CNSDiffSampler(LatentDiffusionSampler[CNSDiffSettings]):
    """``negatives.share`` says who sees a generated negative.

    ``row``: only the row that it was generated for, mixed with a uniform item as in the paper.
    ``group``: every row of its group, in one pool with the group's positives, which is what a
    softmax wants.
    """

    settings_type = CNSDiffSettings

    def __init__(self, settings: CNSDiffSettings, around: Surroundings) -> None:
        super().__init__(settings, around)
        self._cosine, self._known = around.cosine, KnownPositives(around.graph)

    @classmethod
    def footprint(
        cls, settings: CNSDiffSettings, generator: sections.Generator, width: int
    ) -> Footprint:
        if settings.share == "row":
            return Footprint(candidates=1, own=1)
        generated = len(generator.levels) * rows_learned_from(generator, width)
        return Footprint(candidates=0, own=0, pool=width + generated)

    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        if self.settings.share == "group":
            return no_candidates(batch)
        return uniform_candidates(self.graph, batch, draws, 1)

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        """Negatives from one reverse chain per row, and the diffusion loss."""
        in_pool = self.settings.share == "group"
        made = self.generate(encoded, draws, whole=not in_pool)
        if in_pool:
            found = self._in_pool(made.vector_LBD, encoded)
        else:
            hard_BD = hardest(made.vector_LBD, encoded.user_BD)
            mix_B = draws.beta(*self._mix_at(progress))
            found = mixture(hard_BD, encoded.candidate_BMD[:, 0], mix_B)
        return replace(found, terms=dict(made.terms), observed=dict(made.observed))

    def _in_pool(self, vector_LbD: Tensor, encoded: EncodedBatch) -> Negatives:
        made_GSD = torch.cat([encoded.by_group(vector_bD) for vector_bD in vector_LbD], dim=1)
        if self._cosine:
            made_GSD = functional.normalize(made_GSD, dim=2)
        pool, hard_BD = self._pool(made_GSD, encoded), made_GSD.flatten(0, 1)
        return Negatives(encoded.candidate_BMD, pool=pool, hard_BD=hard_BD)

    def _pool(self, made_GSD: Tensor, encoded: EncodedBatch) -> Pool:
        """The group's positives and what was generated from some of them, [G, W + S, D].

        Only some of the W rows generated vectors, so each vector counts for W / some of them: the
        log of that number is its logit offset. A row leaves out a vector that its user likes as
        much as the positive, or nearly: it may well be a positive that was not seen.
        """
        weight_GW, levels = encoded.by_group(encoded.weight_B), len(self._generator.levels)
        width, learned = weight_GW.shape[1], made_GSD.shape[1] // levels
        weight_Gw = weight_GW[:, :learned]
        offset_Gw = torch.full_like(weight_Gw, math.log(width / learned))
        offset_Gw = offset_Gw.masked_fill(weight_Gw == 0, -torch.inf)
        offset_BS = offset_Gw.repeat(1, levels).repeat_interleave(width, 0)
        if self.settings.margin is not None:
            liked_BS = too_close(made_GSD, encoded, self.settings.margin)
            offset_BS = offset_BS.masked_fill(liked_BS, -torch.inf)
        return Pool(
            torch.cat([encoded.by_group(encoded.positive_BD), made_GSD], dim=1),
            torch.cat([batch_offsets(self._known, encoded), offset_BS], dim=1),
        )

    def _mix_at(self, progress: float) -> tuple[float, float]:
        (a0, b0), (a1, b1) = self.settings.mix_start, self.settings.mix_end
        return a0 + progress * (a1 - a0), b0 + progress * (b1 - b0)


def mixture(hard_BD: Tensor, random_BD: Tensor, mix_B: Tensor) -> Negatives:
    """z_neg = lambda z_hard + (1 - lambda) h_j, one negative of each row."""
    mix_B1 = mix_B[:, None]
    mixed_BD = mix_B1 * hard_BD + (1 - mix_B1) * random_BD
    return Negatives(mixed_BD[:, None], hard_BD=hard_BD, contrast=(hard_BD, random_BD))


@torch.no_grad()
def too_close(vector_GSD: Tensor, encoded: EncodedBatch, margin: float) -> Tensor:
    """Whether cos(h_u, vector) > cos(h_u, h_i) - margin, for each row and vector of its group,
    bool [B, S]."""
    user_BD, positive_BD = (
        functional.normalize(rows, dim=1) for rows in (encoded.user_BD, encoded.positive_BD)
    )
    bound_B1 = (user_BD * positive_BD).sum(1, keepdim=True) - margin
    vector_GDS = functional.normalize(vector_GSD, dim=2).transpose(1, 2)
    return torch.bmm(encoded.by_group(user_BD), vector_GDS).flatten(0, 1) > bound_B1
