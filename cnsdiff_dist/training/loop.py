"""The training loop: steps, lines of metrics, evaluations, checkpoints, and how they resume."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cnsdiff_dist import logs, storage
from cnsdiff_dist.checkpoint.commit import Commit, Progress, record_damage
from cnsdiff_dist.checkpoint.manager import Costs
from cnsdiff_dist.data.epoch_plan import ROW_ORDER, EpochPlan, local_streams
from cnsdiff_dist.data.stream import TrainStream
from cnsdiff_dist.distributed.world import Vote
from cnsdiff_dist.errors import TryAgain, UserError
from cnsdiff_dist.runs.opened import OpenRun
from cnsdiff_dist.runs.reporter import Reporter
from cnsdiff_dist.training.finite import diverged, refuse_non_finite
from cnsdiff_dist.training.loader import Loader, StepInputs
from cnsdiff_dist.training.meter import Meter
from cnsdiff_dist.training.step import TrainStep
from cnsdiff_dist.training.validation import Validation

Ids = npt.NDArray[np.int64]
_SKIPS_IN_A_ROW = 10


class Trainer:
    """Trains one run. Every method is collective.

    Raises:
        UserError: from the constructor, when the world size does not divide the streams or
            the dataset lacks the validation split that selects.
    """

    def __init__(self, run: OpenRun) -> None:
        self.config, self.world, self._run = run.config, run.world, run
        self._validation = Validation(run)
        self._plan, self.stream = epoch_plan(run), train_stream(run)
        self.step = TrainStep(run.config, run.graph, run.manifest.environments, run.world)
        self.loader = make_loader(run, self.stream, self.step)
        self.checkpoints = run.checkpoints
        self.progress = Progress(row_order=ROW_ORDER)
        self._meter, self._vote = Meter(run.world), Vote(run.world)
        self.total_steps = total_steps(run)
        self._skips_in_a_row, self._saved_step = 0, 0

    @property
    def finished(self) -> bool:
        return self._is_finished(self.progress)

    def _is_finished(self, progress: Progress) -> bool:
        exhausted = progress.evaluations_since_best >= self.config.train.patience
        return exhausted or progress.step >= self.total_steps

    # --- going on from a checkpoint -----------------------------------------------------------

    def resume(self, say: Callable[[str], None] = lambda _: None) -> Commit | None:
        """Continue from the newest committed checkpoint that is whole, if there is one.

        From now on this training owns the run. ``say`` gets a line for each damaged checkpoint.

        Raises:
            UserError: there are checkpoints and none is whole, or the newest is in mid-epoch and
                of a version that took the rows in another order.
        """
        for commit in self.checkpoints.committed()[-1:]:
            self._refuse_other_order(commit)  # before the run is claimed
        self.checkpoints.claim()
        commits = self.checkpoints.committed()
        for commit in reversed(commits):
            damage = self.checkpoints.damage(commit)
            if damage is None:
                self._refuse_other_order(commit)
                self.load(commit)
                self.progress.row_order = ROW_ORDER
                return commit
            say(f"{storage.display(commit.url)} is damaged ({damage}): the one before is used")
            self.checkpoints.set_aside(commit, damage)
        if commits:
            raise UserError(
                f"{storage.display(self.config.run.dir)}: every checkpoint is damaged; restore "
                "one, or delete checkpoints/ to start anew"
            )
        return None

    def _refuse_other_order(self, commit: Commit) -> None:
        """A resume in mid-epoch would take some rows twice and others never."""
        if record_damage(commit) is not None:
            return
        progress = commit.progress
        other = progress.row_order != ROW_ORDER
        if other and progress.step % self._plan.steps and not self._is_finished(progress):
            raise UserError(
                f"{storage.display(commit.url)}: of a version that took the rows in another order; "
                "finish its epoch with that version, or train anew in another run.dir"
            )

    def load(self, commit: Commit) -> None:
        """Take the state and the progress of a checkpoint."""
        load_checkpoint(self._run, self.step, commit)
        self.progress = commit.progress
        self._saved_step = self.progress.step

    # --- training -----------------------------------------------------------------------------

    def fit(self, reporter: Reporter | None, preempted: Callable[[], bool] = lambda: False) -> None:
        """Train until finished.

        Args:
            reporter: on rank 0.
            preempted: whether this process is to end soon.

        Raises:
            TryAgain: some rank was preempted; all have checkpointed the same step.
            UserError: the training diverged.
        """
        while not self.finished:
            epoch, first = divmod(self.progress.step, self._plan.steps)
            for inputs in self._meter.waited_for(self.loader.steps(epoch, first)):
                self._meter.add(self.take_step(inputs))
                self.progress.step += 1
                logs.context.step = self.progress.step
                if reporter:
                    reporter.advance()
                self._after_step(epoch, inputs.batch.step, reporter)
                if self.finished:
                    break
                if self._vote.any(preempted()):
                    self._stop_here(reporter)
        self.checkpoints.wait()

    def take_step(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Take one step at the place where the training is.

        Returns:
            As :meth:`TrainStep.__call__`.

        Raises:
            UserError: the step was left out, and ``train.non_finite`` does not allow that.
        """
        self.step.set_learning_rates(self.progress.step)
        observed = self.step(inputs, self.progress.step / self.total_steps)
        self._count_skip(not observed)
        return observed

    def _count_skip(self, skipped: bool) -> None:
        """Count the steps that were left out.

        Raises:
            UserError: it is one too many, as ``train.non_finite`` says.
        """
        if not skipped:
            self._skips_in_a_row = 0
            return
        self.progress.skipped += 1
        self._skips_in_a_row += 1
        if self.config.train.non_finite == "stop" or self._skips_in_a_row >= _SKIPS_IN_A_ROW:
            where = ", ".join(map(str, self.step.gate.bad_ranks))
            what = f"loss or gradient of rank {where} is not a finite number"
            raise diverged(what, self.progress.step)

    def _stop_here(self, reporter: Reporter | None) -> None:
        step = self.progress.step
        if self._saved_step != step:
            self._save(self.step.state(), reporter)
        self.checkpoints.wait()
        raise TryAgain(f"preempted: checkpointed at step {step}; run again to go on")

    def _after_step(self, epoch: int, step_in_epoch: int, reporter: Reporter | None) -> None:
        step = self.progress.step
        if step % self.config.train.log_every == 0 or step == self.total_steps:
            self._log(epoch, reporter)
        self._meter.pause()
        evaluation = self._is_evaluation(step_in_epoch + 1) or step == self.total_steps
        every = self.config.checkpoint.every_steps
        if evaluation or (every and step % every == 0):
            state = self.step.state()
            refuse_non_finite(state, self.world, step)
            if evaluation:
                # A checkpoint in the background holds a copy of the state: there may be no memory
                # for that and the evaluation.
                self.checkpoints.wait()
                self._evaluate(epoch, reporter)
            self._save(state, reporter)
        self._meter.go_on()

    def _is_evaluation(self, done: int) -> bool:
        """Whether ``done`` steps of an epoch end one of its evaluation periods."""
        times, steps = self.config.train.evaluations_per_epoch, self._plan.steps
        return done * times // steps > (done - 1) * times // steps

    def _evaluate(self, epoch: int, reporter: Reporter | None) -> None:
        result = self._validation.evaluate(self.step.recommender)
        better = self._validation.note(result, self.progress)
        if reporter:
            reporter.evaluation(self.progress.step, epoch, result, better)

    def _log(self, epoch: int, reporter: Reporter | None) -> None:
        step, progress = self.progress.step, self.progress
        values = self._meter.read(step)
        if "loss" in values:
            progress.first_loss = progress.first_loss or values["loss"]
            limit = self.config.train.max_growth * progress.first_loss
            if 0 < limit < values["loss"]:
                raise diverged(f"the loss is {values['loss']:.4g} (train.max_growth)", step)
        costs, self.checkpoints.costs = self.checkpoints.costs, Costs()
        values |= {"skipped_steps": progress.skipped, "read_retries": storage.patience.retries}
        if costs.count:
            values["checkpoint_wait_seconds"] = costs.waited
            values["checkpoint_write_seconds"] = costs.written
            values["checkpoint_bytes"] = costs.bytes
        if reporter:
            reporter.log(step, epoch, values, self.checkpoints.newest)

    def _save(self, state: dict[str, Any], reporter: Reporter | None) -> None:
        if reporter:
            reporter.publish()
        checkpoint, progress = self.config.checkpoint, self.progress
        record = {"progress": progress.to_json(), "world_size": self.world.size}
        self.checkpoints.save(
            progress.step,
            state,
            record,
            keep=checkpoint.keep,
            best_step=progress.best_step or None,
            background=checkpoint.background,
        )
        self._saved_step = progress.step


def epoch_plan(run: OpenRun) -> EpochPlan:
    """Which train rows each stream of the run gives to each step."""
    data, config = run.config.data, run.config
    rows, seed = run.manifest.train.rows, config.run.seed
    return EpochPlan(rows, config.train.batch, data.streams, data.block_rows, seed)


def total_steps(run: OpenRun) -> int:
    """Steps of the whole training, unless patience ends it before."""
    train = run.config.train
    return min(train.epochs * epoch_plan(run).steps, train.max_steps or sys.maxsize)


def train_stream(run: OpenRun) -> TrainStream:
    """The batches of this rank.

    Raises:
        UserError: the world size does not divide the streams.
    """
    data, world = run.config.data, run.world
    streams = local_streams(data.streams, world.rank, world.size)
    return TrainStream(data.url, run.manifest, epoch_plan(run), streams, data.prefetch_blocks)


def make_loader(run: OpenRun, stream: TrainStream, step: TrainStep) -> Loader:
    """What makes the inputs of a run's steps, ahead of them."""

    def environment_of(items: Ids) -> Ids:
        return run.manifest.environment_of(run.graph.item_degree(items))

    device = run.world.device
    return Loader(run.config, stream, step.sampler, step.recommender, environment_of, device)


def load_checkpoint(run: OpenRun, step: TrainStep, commit: Commit) -> None:
    """Have a step take the tables and the generator of a checkpoint. Collective."""
    state = step.state()
    run.checkpoints.load(commit, state)
    step.load_dense(state)
