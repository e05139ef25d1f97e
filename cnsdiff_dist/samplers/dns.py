"""Dynamic negative sampling: the hardest of M uniform candidates.

DNS, Zhang et al., "Optimizing Top-N Collaborative Filtering via Dynamic Negative Item Sampling",
SIGIR 2013: j = argmax over the candidates of s(u, j).
DNS(M, N), Shi et al., "On the Theories Behind Hard Negative Sampling for Recommendation",
WWW 2023: j is uniform over the N highest-scored of the M candidates; N = 1 is DNS.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.samplers.candidates import CandidateSampler, CandidateSettings, choose, scores
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives


class DNSSettings(CandidateSettings):
    kind: Literal["dns"] = "dns"


class DNSMNSettings(CandidateSettings):
    kind: Literal["dns_mn"] = "dns_mn"
    top: int = Field(4, ge=1, description="N, one of the top N of M at random")

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> Self:
        if self.top > self.candidates:
            raise ValueError(f"top ({self.top}) of {self.candidates} candidates: at most all")
        return self


class DNSSampler(CandidateSampler[DNSSettings]):
    settings_type = DNSSettings

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        return one_of_the_hardest(encoded, draws, 1)


class DNSMNSampler(CandidateSampler[DNSMNSettings]):
    settings_type = DNSMNSettings

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        return one_of_the_hardest(encoded, draws, self.settings.top)


def one_of_the_hardest(encoded: EncodedBatch, draws: Draws, top: int) -> Negatives:
    """One of each row's ``top`` highest-scored candidates, at random."""
    _, score_BM = scores(encoded)
    best_Bn = score_BM.topk(top, dim=1).indices
    return choose(encoded, best_Bn.gather(1, draws.integers(top)[:, None])[:, 0])
