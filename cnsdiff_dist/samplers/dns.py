"""Dynamic negative sampling: the hardest of M uniform candidates.

Zhang et al., "Optimizing Top-N Collaborative Filtering via Dynamic Negative Item Sampling",
SIGIR 2013: j = argmax over the candidates of s(u, j).
DNS(M, N), Shi et al., "On the Theories Behind Hard Negative Sampling for Recommendation",
WWW 2023: j is uniform over the N highest-scored of the M candidates; N = 1 is DNS.
"""

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler, chosen, scores


class DNSSampler(UniformSampler):
    def __init__(self, graph: GraphArrays, count: int, top: int = 1) -> None:
        super().__init__(graph, count)
        self._top = top

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        _, score_BM = scores(latents)
        best_BN = score_BM.topk(self._top, dim=1).indices
        return chosen(latents, best_BN.gather(1, draws.integers(self._top)[:, None])[:, 0])
