"""From ``negatives.kind`` to a sampler."""

from collections.abc import Callable

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.samplers.ahns import AHNSSampler
from cnsdiff_dist.samplers.cnsdiff import CNSDiffSampler
from cnsdiff_dist.samplers.cnsdiff_published import PublishedSampler
from cnsdiff_dist.samplers.dens import DENSSampler
from cnsdiff_dist.samplers.dmns import DMNSSampler
from cnsdiff_dist.samplers.dns import DNSSampler
from cnsdiff_dist.samplers.in_batch import InBatchSampler
from cnsdiff_dist.samplers.mixgcf import MixGCFSampler
from cnsdiff_dist.samplers.popularity import PopularitySampler
from cnsdiff_dist.samplers.protocol import Sampler
from cnsdiff_dist.samplers.softmax import SoftmaxSampler
from cnsdiff_dist.samplers.srns import SRNSSampler
from cnsdiff_dist.samplers.uniform import UniformSampler


def make_sampler(config: Config, graph: GraphArrays, environments: int, world: World) -> Sampler:
    n, dim, seed = config.negatives, config.model.dim, config.run.seed
    makers: dict[str, Callable[[], Sampler]] = {
        "uniform": lambda: UniformSampler(graph, n.count),
        "popularity": lambda: PopularitySampler(graph, n.count, n.gamma),
        "in_batch": lambda: InBatchSampler(graph, 0, n.log_q),
        "mixed": lambda: InBatchSampler(graph, n.count, n.log_q),
        "dns": lambda: DNSSampler(graph, n.candidates),
        "dns_mn": lambda: DNSSampler(graph, n.candidates, n.top),
        "softmax": lambda: SoftmaxSampler(graph, n.candidates, n.rho),
        "mixgcf": lambda: MixGCFSampler(graph, n.candidates),
        "dens": lambda: DENSSampler(graph, n.candidates, dim, seed),
        "ahns": lambda: AHNSSampler(graph, n.candidates, n.hardness),
        "srns": lambda: SRNSSampler(graph, n.candidates, n.hardness),
        "dmns": lambda: DMNSSampler(config, graph, environments, world),
        "cnsdiff_published": lambda: PublishedSampler(config, graph, world),
        "cnsdiff": lambda: CNSDiffSampler(config, graph, environments, world),
    }
    return makers[n.kind]()
