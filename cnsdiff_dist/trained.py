"""A trained run, opened for reading: its best checkpoint's embeddings.

Shapes: U users, I items, D embedding dim.
"""

from dataclasses import dataclass

from torch import Tensor

from cnsdiff_dist import storage
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.graph import GraphArrays, open_graph
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.parallel.checkpoint import Checkpoints, Commit
from cnsdiff_dist.recommender import Recommender
from cnsdiff_dist.rundir import check_dataset, read_config
from cnsdiff_dist.world import World, join_world


@dataclass(frozen=True)
class Trained:
    """``user_UD`` and ``item_ID`` are the encoder's outputs at ``step``, whole on each rank."""

    config: Config
    data_url: str
    manifest: Manifest
    graph: GraphArrays
    world: World
    step: int
    user_UD: Tensor
    item_ID: Tensor


def open_trained(run_url: str, data_url: str | None) -> Trained:
    """Load a run's best checkpoint by validation, at any world size. Collective.

    Raises:
        UserError: no run or no committed checkpoint there, or another dataset.
    """
    config = read_config(run_url)
    data_url = data_url or config.data.url
    manifest = load_manifest(data_url)
    check_dataset(run_url, manifest)
    world = join_world(config.run.timeout_seconds)
    graph = open_graph(data_url, manifest)
    checkpoints = Checkpoints(run_url, world)
    commit = _best(checkpoints.committed(), run_url)
    recommender = Recommender(config, manifest, graph, world)
    checkpoints.load(commit, {"tables": {"weights": recommender.tables.weights()}})
    return Trained(config, data_url, manifest, graph, world, commit.step, *recommender.encode_all())


def _best(commits: list[Commit], run_url: str) -> Commit:
    """The best checkpoint by validation, as the newest one knows it."""
    where = storage.display(run_url)
    if not commits:
        raise UserError(f"{where}: no committed checkpoint yet; train it first")
    best_step = commits[-1].record["progress"]["best_step"]
    matching = [commit for commit in commits if commit.step == best_step]
    if not matching:
        why = f"its best checkpoint, step {best_step}, is gone" if best_step else "not evaluated"
        raise UserError(f"{where}: {why}; train it further")
    return matching[0]
