"""From ``negatives.kind`` to a sampler."""

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.samplers.cnsdiff import CNSDiffSampler
from cnsdiff_dist.samplers.protocol import Sampler
from cnsdiff_dist.samplers.uniform import UniformSampler
from cnsdiff_dist.world import World


def make_sampler(config: Config, graph: GraphArrays, environments: int, world: World) -> Sampler:
    if config.negatives.kind == "cnsdiff":
        return CNSDiffSampler(config, graph, environments, world)
    return UniformSampler(graph)
