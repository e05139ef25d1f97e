"""Opens a run: its config, its dataset, the ranks and its checkpoints."""

from dataclasses import dataclass
from functools import cached_property

from cnsdiff_dist import sections, storage
from cnsdiff_dist.checkpoint.commit import Commit, Progress, record_damage
from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.graph import GraphArrays, open_graph
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.evaluator import Evaluator
from cnsdiff_dist.runs.directory import check_dataset, check_run, read_config


@dataclass(frozen=True)
class OpenRun:
    """A run on this rank.

    Attributes:
        config: of the run; ``data.url`` and ``run.dir`` say where its dataset and its directory
            are now.
        manifest: of its dataset.
    """

    config: Config
    manifest: Manifest
    world: World

    @property
    def url(self) -> str:
        return self.config.run.dir

    @property
    def data_url(self) -> str:
        return self.config.data.url

    @cached_property
    def graph(self) -> GraphArrays:
        """The train graph, memory-mapped at first use. One rank of each node verifies it."""
        return open_graph(self.data_url, self.manifest, verify=self.world.local_rank == 0)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.url, self.world)

    def evaluator(self, split: str, evaluation: sections.Evaluation | None = None) -> Evaluator:
        """Return an evaluator of a split; its settings are by default those of the run's config."""
        wanted = evaluation or self.config.evaluation
        return Evaluator(self.data_url, self.manifest, self.graph, split, wanted, self.world)

    def best_commit(self) -> tuple[Commit, Progress]:
        """Return the best checkpoint, and the progress of the newest one. Collective.

        The newest checkpoint records which one is best by validation. The files of the best one
        are verified.

        Raises:
            UserError: there is no checkpoint, the run was not evaluated, or the best or the newest
                checkpoint is damaged.
        """
        where, commits = storage.display(self.url), self.checkpoints.committed()
        if not commits:
            raise UserError(f"{where}: no committed checkpoint yet; train it first")
        newest = commits[-1]
        _refuse_damage(newest, record_damage(newest))
        step = newest.progress.best_step
        matching = [commit for commit in commits if commit.step == step]
        if not matching:
            why = f"its best checkpoint, step {step}, is gone" if step else "not evaluated"
            raise UserError(f"{where}: {why}; train it further")
        _refuse_damage(matching[0], self.checkpoints.damage(matching[0]))
        return matching[0], newest.progress


def open_run(config: Config) -> OpenRun:
    """Open a run to start it or to continue it. Collective.

    Raises:
        UserError: there is no such dataset, the run has another dataset or config, or the run
            directory holds something else.
    """
    manifest = load_manifest(config.data.url)
    check_run(config, manifest)
    return OpenRun(config, manifest, join_world(config.run.timeout_seconds))


def reopen_run(run_url: str, data_url: str | None = None) -> OpenRun:
    """Open a run that was trained. Collective.

    Args:
        data_url: where its dataset is now; None if it has not moved.

    Raises:
        UserError: there is no run, or the dataset is not the one that it was trained on.
    """
    config = read_config(run_url)
    data = config.data.model_copy(update={"url": data_url or config.data.url})
    run = config.run.model_copy(update={"dir": run_url})
    config = config.model_copy(update={"data": data, "run": run})
    manifest = load_manifest(config.data.url)
    check_dataset(run_url, manifest)
    return OpenRun(config, manifest, join_world(config.run.timeout_seconds))


def _refuse_damage(commit: Commit, damage: str | None) -> None:
    if damage:
        raise UserError(
            f"{storage.display(commit.url)}: damaged ({damage}); restore it, or train further"
        )
