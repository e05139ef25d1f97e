"""Why a sampler helps or hurts: what its negatives are, and what the scores are made of.

Computed from a run's best checkpoint by drawing negatives for a few steps of the train stream,
without any update.

Shapes: B rows, N + P negatives of a row, S generated vectors of a pool, D embedding dimension,
U users, I items.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.ground_truth import read_ground_truth
from cnsdiff_dist.data.dataset import read_split
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.evaluation.evaluator import train_interactions
from cnsdiff_dist.runs.opened import OpenRun, reopen_run
from cnsdiff_dist.samplers.candidates import non_interacted
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives
from cnsdiff_dist.training.loop import load_checkpoint, make_loader, total_steps, train_stream
from cnsdiff_dist.training.step import TrainStep

Ids = npt.NDArray[np.int64]
FILE = "diagnostics.json"
_EPOCH = 2**31 - 1  # no training draws from it


def diagnose(run_url: str, data_url: str | None = None, steps: int = 8) -> dict[str, Any]:
    """Diagnose a run and write RUN/diagnostics.json. Collective.

    Returns:
        ``false_hard_negatives``: the share of rows whose hardest negative (for a synthetic one,
        the nearest real item by cosine that the user has no train interaction with) is a
        held-out positive of the user, among rows whose user has any; ``false_negatives`` and
        ``chance``: the same of any one of its negatives, and of a uniform one; ``hardness``:
        the share of negatives that outscore the positive; ``negative_log_degree`` and
        ``positive_log_degree``: mean log(1 + train degree); ``score_popularity``: mean over
        users of the squared correlation of s(u, .) with log(1 + degree). With the truth of a
        synthetic dataset beside it, ``true_preference`` of the hardest negatives and
        ``true_preference_uniform``. With a generator, ``denoising_error`` (1 is the mean
        predictor's), ``diversity`` (1 - mean pairwise cosine of the centred vectors) and
        ``condition_variance`` (the share of the variance of what is generated that the
        conditions and the source explain, not the noise).

    Raises:
        UserError: there is no run, or no checkpoint yet.
    """
    run = reopen_run(run_url, data_url)
    step = TrainStep(run.config, run.graph, run.manifest.environments, run.world)
    commit, _ = run.best_commit()
    load_checkpoint(run, step, commit)
    with torch.no_grad():
        result = Probe(run, step, commit.step / total_steps(run)).measure(steps)
    if run.world.is_main:
        storage.write_json(f"{run_url}/{FILE}", result)
    run.world.barrier()
    return result


def read_diagnostics(run_url: str) -> dict[str, Any] | None:
    """What :func:`diagnose` wrote; None if it did not."""
    path = f"{run_url}/{FILE}"
    return json.loads(storage.read_text(path)) if storage.exists(path) else None


class Probe:
    """Draws negatives with a step that is not taken, and measures them.

    Args:
        progress: of the training, 0 to 1, at which negatives are drawn.
    """

    def __init__(self, run: OpenRun, step: TrainStep, progress: float) -> None:
        self._run, self._step, self._graph = run, step, run.graph
        self._progress = progress
        self._cosine = run.config.objective.similarity == "cosine"
        self._degree = np.diff(run.graph.item_indptr)
        own = step.recommender.encode_all()
        self._user_UD, self._item_ID = (
            _all_rows(rows_RD, count, run.world)
            for rows_RD, count in zip(own, (run.graph.users, run.graph.items), strict=True)
        )
        self._held_out = _held_out(run.data_url, run.manifest)
        self._truth = read_ground_truth(run.data_url, run.manifest)

    def measure(self, steps: int) -> dict[str, Any]:
        """The means of all values over the rows of some steps and all ranks."""
        stream, found = train_stream(self._run), []
        loader = make_loader(self._run, stream, self._step)
        for batch in stream.batches(0):
            if batch.step == steps:
                break
            inputs = loader.prepare(batch, _EPOCH)
            encoded, negatives, _ = self._step.draw_negatives(inputs, self._progress)
            found.append(self.values_of(encoded, negatives, inputs.draws))
        result: dict[str, Any] = {"kind": self._run.config.negatives.kind}
        for name in found[0]:
            values = torch.cat([entry[name] for entry in found]).double()
            known = ~values.isnan()
            sums = torch.stack([values[known].sum(), known.sum()])
            total, count = self._run.world.sum(sums.to(self._item_ID.device)).tolist()
            result[name] = total / count if count else None
        return {**result, "score_popularity": self._score_popularity()}

    def values_of(
        self, encoded: EncodedBatch, negatives: Negatives, draws: Draws
    ) -> dict[str, Tensor]:
        """Values per row of one step; NaN where a row does not count."""
        batch, valid_B = encoded.batch, encoded.weight_B.cpu() > 0
        logit_BN = negatives.logits(encoded.user_BD, self._cosine)
        positive_B1 = (encoded.user_BD * encoded.positive_BD).sum(1, keepdim=True)
        hardest_B = self._hardest(encoded, negatives, logit_BN)
        any_B = self._any(encoded, negatives, logit_BN)
        uniform_B = non_interacted(self._graph, batch.users, batch.items, draws.uniform(1)[:, 0])
        degree_I, none_B = torch.from_numpy(np.log1p(self._degree)), torch.from_numpy(hardest_B < 0)
        out = {
            "false_hard_negatives": self._is_held_out(batch.users, hardest_B),
            "false_negatives": self._is_held_out(batch.users, any_B),
            "chance": self._is_held_out(batch.users, uniform_B),
            "hardness": _share((logit_BN > positive_B1).cpu(), logit_BN.isfinite().cpu()),
            "negative_log_degree": degree_I[hardest_B].masked_fill(none_B, torch.nan),
            "uniform_log_degree": degree_I[uniform_B],
            "positive_log_degree": degree_I[batch.items],
        }
        if self._truth is not None:
            preference_B = self._truth.preference(batch.users, hardest_B)
            out["true_preference"] = preference_B.masked_fill(none_B, torch.nan)
            out["true_preference_uniform"] = self._truth.preference(batch.users, uniform_B)
        out = {name: value.masked_fill(~valid_B, torch.nan) for name, value in out.items()}
        if "denoising_error" in negatives.observed:
            out["denoising_error"] = negatives.observed["denoising_error"].cpu()
            out |= self._generator_health(encoded, negatives, draws)
        return out

    def _hardest(self, encoded: EncodedBatch, negatives: Negatives, logit_BN: Tensor) -> Ids:
        """The item of each row's hardest negative, int64 [B]; -1 if it has no negative."""
        if negatives.hard_BD is not None:
            made_BD = _generated(encoded, negatives, logit_BN, hardest=True)
            return self._nearest(encoded.batch.users, made_BD)
        parts = [] if negatives.item_BN is None else [negatives.item_BN]
        if negatives.pool is not None and negatives.pool.item_GP is not None:
            width = len(logit_BN) // encoded.groups
            parts.append(negatives.pool.item_GP.repeat_interleave(width, 0))
        items = torch.cat(parts, dim=1)
        best_B, index_B = logit_BN.max(1)
        chosen = items.gather(1, index_B[:, None])[:, 0].masked_fill(best_B == -torch.inf, -1)
        found: Ids = chosen.cpu().numpy()
        return found

    def _any(self, encoded: EncodedBatch, negatives: Negatives, logit_BN: Tensor) -> Ids:
        """The item of one negative per row, not the hardest: its own first, or a neighbour's
        place in the pool."""
        if negatives.hard_BD is not None:
            made_BD = _generated(encoded, negatives, logit_BN, hardest=False)
            return self._nearest(encoded.batch.users, made_BD)
        if negatives.item_BN is not None and negatives.item_BN.shape[1]:
            own: Ids = negatives.item_BN[:, 0].cpu().numpy()
            return own
        return encoded.batch.items.reshape(encoded.groups, -1)[:, ::-1].ravel()

    def _nearest(self, users: Ids, vector_BD: Tensor) -> Ids:
        """The nearest item by cosine that is no train item of the user; -1 of a NaN vector."""
        item_DI = functional.normalize(self._item_ID, dim=1).t()
        train = train_interactions(self._graph)
        found = []
        for start in range(0, len(users), 256):
            cosine = vector_BD[start : start + 256] @ item_DI
            row, item = train.of(users[start : start + 256])
            cosine[torch.from_numpy(row), torch.from_numpy(item)] = -torch.inf
            found.append(cosine.argmax(1).masked_fill(cosine.isnan().any(1), -1).cpu().numpy())
        return np.concatenate(found)

    def _is_held_out(self, users: Ids, items: Ids) -> Tensor:
        hit = torch.from_numpy(self._held_out.contain(users, items)).double()
        has = self._held_out.indptr[users] < self._held_out.indptr[users + 1]
        return hit.masked_fill(~torch.from_numpy(has & (items >= 0)), torch.nan)

    def _generator_health(
        self, encoded: EncodedBatch, negatives: Negatives, draws: Draws
    ) -> dict[str, Tensor]:
        """Generate again from the same rows with fresh noise, and compare."""
        again = self._step.sampler.negatives(encoded, draws, 1.0)
        assert negatives.hard_BD is not None and again.hard_BD is not None
        one, two = negatives.hard_BD, again.hard_BD
        within = (one - two).square().sum() / 2
        total = (torch.cat([one, two]) - one.mean(0)).square().sum() / 2
        unit = functional.normalize(one - one.mean(0), dim=1)
        rows = len(unit)
        cosine = (unit.sum(0).square().sum() - rows) / max(rows * (rows - 1), 1)
        return {
            "diversity": (1 - cosine)[None].cpu(),
            "condition_variance": (1 - within / total.clamp(min=1e-12)).clamp(0, 1)[None].cpu(),
        }

    def _score_popularity(self, users: int = 512) -> float:
        """Of evenly spread users, the mean R^2 of their scores on log(1 + degree)."""
        some = torch.linspace(0, len(self._user_UD) - 1, min(users, len(self._user_UD))).long()
        score = self._user_UD[some.to(self._user_UD.device)] @ self._item_ID.t()
        score = functional.normalize(score - score.mean(1, keepdim=True), dim=1)
        degree = torch.from_numpy(np.log1p(self._degree)).to(score)
        degree = functional.normalize(degree - degree.mean(), dim=0)
        return float((score @ degree).square().mean())


def _all_rows(rows_RD: Tensor, count: int, world: World) -> Tensor:
    """The rows of all ranks together, [count, D]: diagnostics are for datasets of that size."""
    each = len(world.rows_of(0, count))
    padded = rows_RD.new_zeros(each, rows_RD.shape[1], device=world.device)
    padded[: len(rows_RD)] = rows_RD
    return world.gather(padded).flatten(0, 1)[:count]


def _share(which_BN: Tensor, of_BN: Tensor) -> Tensor:
    """NaN where a row has none."""
    return (which_BN & of_BN).sum(1) / of_BN.sum(1)


def _generated(
    encoded: EncodedBatch, negatives: Negatives, logit_BN: Tensor, hardest: bool
) -> Tensor:
    """A generated vector per row, [B, D]; NaN if the row has none.

    It is the row's own or, of those that its group shares and the row does not leave out, the one
    with the highest logit or, not the ``hardest``, a neighbour's.
    """
    made_BD = negatives.hard_BD
    assert made_BD is not None
    if negatives.pool is None:
        return made_BD
    made_GSD = encoded.by_group(made_BD)
    order_BS = logit_BN[:, -made_GSD.shape[1] :]
    rows, shared = order_BS.shape
    out_BS, row_B = order_BS == -torch.inf, torch.arange(rows, device=made_BD.device)
    if not hardest:
        distance_BS = (torch.arange(shared, device=made_BD.device) - row_B[:, None]) % shared
        order_BS = torch.where(out_BS, -torch.inf, -distance_BS.float())
    group_B = row_B // (rows // encoded.groups)
    best_BD = made_GSD[group_B, order_BS.argmax(1)]
    return best_BD.masked_fill(out_BS.all(1, keepdim=True), torch.nan)


def _held_out(url: str, manifest: Manifest) -> Interactions:
    """All validation and test pairs."""
    pairs = [read_split(url, manifest, name) for name in manifest.splits if name != "train"]
    users, items = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return Interactions.from_pairs(users, items, (manifest.users, manifest.items))
