"""From a config to the components that it configures: the one place that knows the whole tree."""

from typing import Any

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.distributed.sharded_tables import ShardedTables
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models.recommender import Recommender
from cnsdiff_dist.samplers import registry
from cnsdiff_dist.samplers.protocol import Sampler, Surroundings


def make_recommender(config: Config, graph: GraphArrays, world: World) -> Recommender:
    """The tables with their initial rows, sharded, under the encoder. Collective."""
    tables = ShardedTables(
        graph.users,
        graph.items,
        config.model.dim,
        config.tables,
        config.data.streams,
        config.run.seed,
        world,
    )
    return Recommender(tables, config.model, config.objective, graph, world)


def make_sampler(
    config: Config, graph: GraphArrays, environments: int, world: World
) -> Sampler[Any]:
    """The sampler of ``negatives.kind``."""
    around = Surroundings(
        graph=graph,
        world=world,
        environments=environments,
        dim=config.model.dim,
        cosine=config.objective.similarity == "cosine",
        seed=config.run.seed,
        generator=config.generator,
        loss=config.loss,
    )
    return registry.make_sampler(config.negatives, around)
