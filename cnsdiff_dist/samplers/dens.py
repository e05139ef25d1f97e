"""Disentangled negative sampling: alike in what does not matter, unlike in what does.

Lai et al., "Disentangled Negative Sampling for Collaborative Filtering", WSDM 2023. A gate
splits each item vector into a relevant and an irrelevant part: for the positive, g_i =
sigmoid(W h_i + U h_u) and the relevant part is h_i g_i; for a candidate, g_j = sigmoid(V h_j + Z
(h_i g_i)). The negative is the candidate with the greatest s(u, w h_j - h_j g_j): at w = 1 that is
the score of its irrelevant part, at w = 0 the lowest score of its relevant part. Here w = 1 -
progress; the paper's w is 0 after a number of warm-up epochs. A contrastive term trains the gates:
the relevant part of the positive must score above its irrelevant part, and for the negative the
reverse. Left out are gates per propagation layer (a sampler sees only the pooled output),
contrasts between the two items, and the term's gradient into the embeddings: it trains only the
gates.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.samplers.candidates import CandidateSampler, CandidateSettings, choose, pick
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives


class DENSSettings(CandidateSettings):
    kind: Literal["dens"] = "dens"


class Gates(nn.Module):
    """The positive's gate [B, D] and the candidates' [B, M, D], in 0..1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.positive = nn.Linear(2 * dim, dim)
        self.candidate = nn.Linear(2 * dim, dim)

    def forward(
        self, user_BD: Tensor, positive_BD: Tensor, candidate_BMD: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = self.positive.weight.dtype
        gate_BD = self.positive(torch.cat([positive_BD, user_BD], 1).to(dtype)).sigmoid()
        relevant_BMD = (positive_BD * gate_BD)[:, None].expand_as(candidate_BMD)
        both = torch.cat([candidate_BMD, relevant_BMD], 2).to(dtype)
        return gate_BD.to(user_BD.dtype), self.candidate(both).sigmoid().to(user_BD.dtype)


class DENSSampler(CandidateSampler[DENSSettings]):
    settings_type = DENSSettings

    @classmethod
    def make_network(
        cls, generator: sections.Generator, dim: int, environments: int
    ) -> nn.Module | None:
        return Gates(dim)

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        assert self.network is not None
        user_BD, positive_BD, candidate_BMD = (
            rows.detach() for rows in (encoded.user_BD, encoded.positive_BD, encoded.candidate_BMD)
        )
        gate_BD, gate_BMD = self.network(user_BD, positive_BD, candidate_BMD)
        with torch.no_grad():
            wanted_BMD = candidate_BMD * (1 - progress - gate_BMD)
            column_B = torch.einsum("bd,bmd->bm", user_BD, wanted_BMD).argmax(1)
        made = choose(encoded, column_B)
        negative_BD, own_BD = pick(candidate_BMD, column_B), pick(gate_BMD, column_B)
        margin_B = (user_BD * positive_BD * (2 * gate_BD - 1)).sum(1)
        other_B = (user_BD * negative_BD * (1 - 2 * own_BD)).sum(1)
        gates_B = functional.softplus(-margin_B) + functional.softplus(-other_B)
        return replace(made, terms={"gates": gates_B})
