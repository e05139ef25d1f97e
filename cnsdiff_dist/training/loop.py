"""The training loop: batches -> embeddings -> negatives -> losses -> updates -> checkpoints.

Shapes: B rows of this rank, M candidates a row, D embedding dim.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cnsdiff_dist import logs, storage
from cnsdiff_dist.checkpoint.commit import Commit, Progress, record_damage
from cnsdiff_dist.checkpoint.files import local_tensors
from cnsdiff_dist.checkpoint.manager import Checkpoints, Costs
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.epoch_plan import ROW_ORDER, EpochPlan, local_streams
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.data.stream import TrainStream
from cnsdiff_dist.distributed.dense_engine import DenseEngine
from cnsdiff_dist.distributed.world import Vote, World, to_device
from cnsdiff_dist.errors import TryAgain, UserError
from cnsdiff_dist.evaluation.adjustment import log_p_train
from cnsdiff_dist.evaluation.evaluator import Evaluator
from cnsdiff_dist.models import losses
from cnsdiff_dist.models.recommender import Recommender
from cnsdiff_dist.runs.reporter import Reporter
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.registry import make_sampler
from cnsdiff_dist.training.loader import Loader, Ready

_SKIPS_IN_A_ROW = 10


class Trainer:
    """Trains one run. Every method is collective.

    Raises:
        UserError: from the constructor, when the world size does not divide the streams or
            the dataset lacks the validation split that selects.
    """

    def __init__(
        self, config: Config, manifest: Manifest, graph: GraphArrays, world: World
    ) -> None:
        self.config, self.world = config, world
        if config.train.select_split not in manifest.splits:
            raise UserError(
                f"train.select_split={config.train.select_split}: dataset {manifest.name} has only "
                f"{', '.join(manifest.splits)}; choose another, or prepare it with one"
            )
        self._manifest, self._graph = manifest, graph
        data = config.data
        self._plan = EpochPlan(
            manifest.train.rows, config.train.batch, data.streams, data.block_rows, config.run.seed
        )
        streams = local_streams(data.streams, world.rank, world.size)
        self.stream = TrainStream(data.url, manifest, self._plan, streams, data.prefetch_blocks)
        self.recommender = Recommender(config, graph, world)
        self.sampler = make_sampler(config, graph, manifest.environments, world)
        self.loader = Loader(config, self.stream, self.sampler, self.recommender, world.device)
        rows = config.train.batch // world.size
        self.dense = DenseEngine(self.sampler.network, config.generator, rows)
        self.sampler.network = self.dense.network
        self._evaluator = Evaluator(
            data.url, manifest, graph, config.train.select_split, config.evaluation, world
        )
        self._log_p_R = log_p_train(graph, world)
        self.checkpoints = Checkpoints(config.run.dir, world)
        self.progress = Progress(row_order=ROW_ORDER)
        self._meter = _Meter(world)
        self._gate, self._vote = _Gate(world), Vote(world)
        self._skips_in_a_row, self._saved_step = 0, 0

    @property
    def total_steps(self) -> int:
        train = self.config.train
        return min(train.epochs * self._plan.steps, train.max_steps or sys.maxsize)

    @property
    def finished(self) -> bool:
        return self._is_finished(self.progress)

    def _is_finished(self, progress: Progress) -> bool:
        exhausted = progress.evaluations_since_best >= self.config.train.patience
        return exhausted or progress.step >= self.total_steps

    def resume(self, say: Callable[[str], None] = lambda _: None) -> Commit | None:
        """Continue from the newest committed checkpoint that is whole, if there is one; ``say``
        hears of those that are not. From now on this training owns the run. Collective.

        Raises:
            UserError: there are checkpoints and none is whole, or it is in mid-epoch and of a
                version that took the rows in another order.
        """
        for commit in self.checkpoints.committed()[-1:]:
            self._refuse_other_order(commit)  # before its owner hears of us
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
        """In mid-epoch it would take some rows twice and others never."""
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
        """Become what was saved. Collective."""
        state = self.state()
        self.checkpoints.load(commit, state)
        self.dense.load_state(state["dense"])
        self.progress = commit.progress
        self._saved_step = self.progress.step

    def state(self) -> dict[str, Any]:
        """The checkpoint tree: table shards (live) and the dense part (a copy)."""
        return {"tables": self.recommender.tables.state(), "dense": self.dense.state()}

    def fit(self, reporter: Reporter | None, preempted: Callable[[], bool] = lambda: False) -> None:
        """Train until finished; ``reporter`` is rank 0's, ``preempted`` tells whether this process
        is to end soon.

        Raises:
            TryAgain: some rank was preempted; all have checkpointed the same step.
        """
        while not self.finished:
            epoch, first = divmod(self.progress.step, self._plan.steps)
            for ready in self._meter.waited_for(self.loader.steps(epoch, first)):
                self._meter.add(self.step(ready))
                self.progress.step += 1
                logs.context.step = self.progress.step
                if reporter:
                    reporter.advance()
                self._after_step(epoch, ready.batch.step, reporter)
                if self.finished:
                    break
                if self._vote.any(preempted()):
                    self._stop_here(reporter)
        self.checkpoints.wait()

    def _stop_here(self, reporter: Reporter | None) -> None:
        step = self.progress.step
        if self._saved_step != step:
            self._save(self.state(), reporter)
        self.checkpoints.wait()
        raise TryAgain(f"preempted: checkpointed at step {step}; run again to go on")

    def step(self, ready: Ready) -> dict[str, Tensor]:
        """One update of tables and generator on a global batch.

        Returns:
            This rank's part of each observed mean over the global batch, on the device; nothing
            when the step was left out, which all ranks do together.

        Raises:
            UserError: loss or gradient is not finite, and ``train.non_finite`` is ``stop``.
        """
        config = self.config
        self._set_learning_rates()
        latents, negatives, l2_B = self.draw_negatives(ready)
        ranking_B, hardness_B = self._rank(latents, negatives)
        terms = {config.objective.kind: ranking_B, "l2": config.loss.l2 * l2_B, **negatives.terms}
        if config.loss.contrastive:
            terms["contrastive"] = self._contrast(latents, negatives, ready.draws)
        share_B = latents.weight / ready.batch.valid_rows
        loss = torch.stack(list(terms.values())).sum(0) @ share_B
        # Gradients are averaged over ranks; the mean over the global batch is a sum over them.
        self._gate.loss = loss.detach()
        self.dense.backward(loss * self.world.size)
        if self._gate.bad_ranks:
            self._leave_out(self._gate.bad_ranks)
            return {}
        self._skips_in_a_row = 0
        self.dense.step()
        observed = {"loss": loss.detach(), "rows": latents.weight.sum()}
        for name, value_B in (terms | {"hardness": hardness_B} | negatives.observed).items():
            observed[name] = value_B.detach() @ share_B
        return observed

    def _leave_out(self, ranks: list[int]) -> None:
        step, config = self.progress.step, self.config.train
        self.dense.discard()
        self.progress.skipped += 1
        self._skips_in_a_row += 1
        if config.non_finite == "stop" or self._skips_in_a_row >= _SKIPS_IN_A_ROW:
            where = ", ".join(map(str, ranks))
            raise _diverged(f"loss or gradient of rank {where} is not a finite number", step)

    def draw_negatives(self, ready: Ready) -> tuple[Latents, Negatives, Tensor]:
        """A batch encoded, its negatives, and the L2 of its table rows [B]. Collective."""
        latents, l2_B = self._encode(ready)
        progress = self.progress.step / self.total_steps
        return latents, self.sampler.negatives(latents, ready.draws, progress), l2_B

    def _encode(self, ready: Ready) -> tuple[Latents, Tensor]:
        """Look up and encode users, positives and candidates in one go."""
        batch, (rows, per_row) = ready.batch, ready.candidates.shape
        sizes = [rows, rows, rows * per_row]
        h_TD, half_square = self.recommender.encode(ready.block, self._gate)
        user_BD, item = self.recommender.scored(*h_TD.split([rows, rows + rows * per_row]))
        positive_BD, candidate = item.split(sizes[1:])
        user_B, positive_B, candidate_B = half_square.split(sizes)
        device = self.world.device
        environment = self._manifest.environment_of(self._graph.item_degree(batch.items))
        latents = Latents(
            batch,
            ready.candidates,
            user_BD,
            positive_BD,
            candidate.view(rows, per_row, self.config.model.dim),
            to_device(torch.from_numpy(environment), device),
            to_device(torch.from_numpy(batch.weight), device),
            len(batch.streams),
        )
        candidate_BM = candidate_B.view(rows, per_row)
        return latents, user_B + positive_B + candidate_BM.sum(1) / max(per_row, 1)

    def _rank(self, latents: Latents, negatives: Negatives) -> tuple[Tensor, Tensor]:
        """The objective [B], and the share of a row's negatives that outscore its positive."""
        objective = self.config.objective
        positive_B = (latents.user_BD * latents.positive_BD).sum(1)
        logit_BN = negatives.logits(latents.user_BD, objective.similarity == "cosine")
        with torch.no_grad():
            # Straight to float: a mean over bool costs four times as much on a CPU.
            harder_BN = torch.gt(logit_BN, positive_B[:, None], out=torch.empty_like(logit_BN))
        loss = losses.sampled_softmax if objective.kind == "softmax" else losses.bpr
        return loss(positive_B, logit_BN), harder_BN.mean(1)

    def _contrast(self, latents: Latents, negatives: Negatives, draws: Draws) -> Tensor:
        """InfoNCE between a positive and its noised self; the noise is relative to its length."""
        loss, positive_BD = self.config.loss, latents.positive_BD
        with torch.no_grad():
            length_B1 = positive_BD.norm(dim=1, keepdim=True) / positive_BD.shape[1] ** 0.5
            noise_BD = loss.positive_noise * length_B1 * draws.normal(positive_BD.shape[1])
        own_BND = negatives.vector_BND
        others = negatives.contrast or ((own_BND[:, 0],) if own_BND.shape[1] else (positive_BD,))
        return loss.contrastive * losses.info_nce(
            positive_BD, positive_BD + noise_BD, list(others), latents.weight, latents.groups,
            loss.temperature,
        )  # fmt: skip

    def _set_learning_rates(self) -> None:
        warmup = self.config.train.warmup_steps
        if self.progress.step <= warmup:
            factor = min(1.0, (self.progress.step + 1) / max(warmup, 1))
            self.recommender.tables.scale_lr(factor)
            self.dense.scale_lr(factor)

    def _after_step(self, epoch: int, step_in_epoch: int, reporter: Reporter | None) -> None:
        step = self.progress.step
        if step % self.config.train.log_every == 0 or step == self.total_steps:
            self._log(epoch, reporter)
        self._meter.pause()
        evaluation = self._is_evaluation(step_in_epoch + 1) or step == self.total_steps
        every = self.config.checkpoint.every_steps
        if evaluation or (every and step % every == 0):
            state = self.state()
            self._refuse_divergence(state)
            if evaluation:
                self.checkpoints.wait()  # there may be no room for its copy and the evaluation
                self._evaluate(epoch, reporter)
            self._save(state, reporter)
        self._meter.go_on()

    def _log(self, epoch: int, reporter: Reporter | None) -> None:
        step, progress = self.progress.step, self.progress
        values = self._meter.read(step)
        if "loss" in values:
            progress.first_loss = progress.first_loss or values["loss"]
            limit = self.config.train.max_growth * progress.first_loss
            if 0 < limit < values["loss"]:
                raise _diverged(f"the loss is {values['loss']:.4g} (train.max_growth)", step)
        costs, self.checkpoints.costs = self.checkpoints.costs, Costs()
        values |= {"skipped_steps": progress.skipped, "read_retries": storage.patience.retries}
        if costs.count:
            values |= {
                "checkpoint_wait_seconds": costs.waited, "checkpoint_write_seconds": costs.written,
                "checkpoint_bytes": costs.bytes,
            }  # fmt: skip
        if reporter:
            reporter.log(step, epoch, values, self.checkpoints.newest)

    def _is_evaluation(self, done: int) -> bool:
        """Whether ``done`` steps of an epoch end one of its evaluation periods."""
        times, steps = self.config.train.evaluations_per_epoch, self._plan.steps
        return done * times // steps > (done - 1) * times // steps

    def _evaluate(self, epoch: int, reporter: Reporter | None) -> None:
        result = self._best_adjusted()
        value = result["metrics"][self.config.train.select_metric]
        progress = self.progress
        better = value > progress.best
        if better:
            progress.best, progress.best_step = value, progress.step
            progress.best_alpha = result["metrics"]["alpha"]
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        if reporter:
            reporter.evaluation(progress.step, epoch, result, better)

    def _best_adjusted(self) -> dict[str, Any]:
        """The validation's result under the alpha that serves it best."""
        vectors, results = self.recommender.encode_all(), []
        for alpha in self.config.evaluation.alphas:
            result = self._evaluator(*vectors, alpha * self._log_p_R if alpha else None)
            results.append({**result, "metrics": {**result["metrics"], "alpha": alpha}})
        return max(results, key=lambda r: r["metrics"][self.config.train.select_metric])

    def _refuse_divergence(self, state: dict[str, Any]) -> None:
        """What is not finite is neither evaluated nor saved. Collective."""
        # A sum is not finite when a term is not, and needs no array of the table's size.
        bad = sum((~torch.isfinite(tensor.sum())).float() for tensor in local_tensors(state))
        if self.world.sum(torch.as_tensor(bad, device=self.world.device)) > 0:
            raise _diverged("a parameter is not a finite number", self.progress.step)

    def _save(self, state: dict[str, Any], reporter: Reporter | None) -> None:
        if reporter:
            reporter.publish()
        record = {"progress": self.progress.to_json(), "world_size": self.world.size}
        keep, best = self.config.checkpoint.keep, self.progress.best_step or None
        background = self.config.checkpoint.background
        self.checkpoints.save(self.progress.step, state, record, keep, best, background)
        self._saved_step = self.progress.step


def _diverged(what: str, step: int) -> UserError:
    return UserError(
        f"training diverged: {what} at step {step}; lower tables.lr or generator.lr "
        "(earlier checkpoints are good)"
    )


class _Gate:
    """Keeps a step that is not finite out of the tables: FBGEMM updates them inside backward.

    Called with the gradient of the looked-up rows [N, D]; all ranks then know whose loss or
    gradient was bad, and hand a gradient of zeros on, which moves no row under SGD and Adagrad.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.loss = torch.zeros(())
        self.bad_ranks: list[int] = []

    def __call__(self, gradient: Tensor) -> Tensor:
        total = gradient.sum() + self.loss
        flags = self._world.gather((~torch.isfinite(total)).float())
        self.bad_ranks = flags.nonzero().flatten().tolist()
        return torch.zeros_like(gradient) if self.bad_ranks else gradient


class _Meter:
    """Means of what steps return since the last reading, over all ranks, and their pace."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self._steps, self._seconds, self._since = 0, 0.0, time.monotonic()
        self._began, self._useful, self._waited = self._since, 0.0, 0.0

    def waited_for(self, steps: Iterator[Ready]) -> Iterator[Ready]:
        """The same steps; the time until each is there counts as ``data_wait_seconds``."""
        while True:
            began = time.monotonic()
            ready = next(steps, None)
            self._waited += time.monotonic() - began
            if ready is None:
                return
            yield ready

    def add(self, observed: dict[str, Tensor]) -> None:
        for name, value in observed.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += bool(observed)

    def pause(self) -> None:
        """Evaluations and checkpoints are not training time."""
        self._seconds += time.monotonic() - self._since

    def go_on(self) -> None:
        self._since = time.monotonic()

    def read(self, step: int) -> dict[str, float]:
        """The means, samples per second of all ranks together, the most memory that a rank ever
        held, in GiB, how long this rank waited for its rows, and goodput: the share of this
        process's time that went into steps which count, not into evaluations, checkpoints and
        steps left out. Collective.

        Raises:
            UserError: the loss is not a finite number.
        """
        self.pause()
        self._useful += self._seconds if self._sums else 0.0
        values = {
            "goodput": self._useful / (time.monotonic() - self._began),
            "data_wait_seconds": self._waited,
        }
        if self._sums:
            totals = self._world.sum(torch.stack(list(self._sums.values()))).tolist()
            means = dict(zip(self._sums, totals, strict=True))
            values["samples_per_second"] = means.pop("rows") / self._seconds
            values |= {name: value / self._steps for name, value in means.items()}
            if not math.isfinite(values["loss"]):
                raise _diverged(f"the loss is {values['loss']}", step)
        self._sums, self._steps, self._seconds, self._waited = {}, 0, 0.0, 0.0
        self.go_on()
        return {**values, "memory_gib": self._world.peak_memory()}
