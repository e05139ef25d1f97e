"""Why a sampler helps or hurts: what its negatives are, and what the scores are made of.

Computed from a run's best checkpoint by drawing negatives for a few steps of the train stream,
without any update. Shapes: B rows, N + P negatives of a row, D embedding dim, U users, I items.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional

from cnsdiff_dist import storage
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest, read_ids, read_split
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays, open_graph
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.evaluation.evaluator import train_interactions
from cnsdiff_dist.inference.trained_model import best_commit
from cnsdiff_dist.runs.directory import read_config
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import non_interacted
from cnsdiff_dist.training.loop import Trainer

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
    config = read_config(run_url)
    data_url = data_url or config.data.url
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"url": data_url}),
                "run": config.run.model_copy(update={"dir": run_url})}
    )  # fmt: skip
    manifest = load_manifest(data_url)
    world = join_world(config.run.timeout_seconds)
    graph = open_graph(data_url, manifest, verify=world.local_rank == 0)
    trainer = Trainer(config, manifest, graph, world)
    trainer.load(best_commit(trainer.checkpoints, run_url)[0])
    with torch.no_grad():
        result = _Probe(config, manifest, graph, trainer).run(steps)
    if world.is_main:
        storage.write_json(f"{run_url}/{FILE}", result)
    world.barrier()
    return result


class _Probe:
    def __init__(
        self, config: Config, manifest: Manifest, graph: GraphArrays, trainer: Trainer
    ) -> None:
        self._config, self._manifest, self._graph = config, manifest, graph
        self._trainer, self._url = trainer, config.data.url
        self._degree = np.diff(graph.item_indptr)
        own = trainer.recommender.encode_all()
        self._user_UD, self._item_ID = (
            _whole(rows_RD, count, trainer.world)
            for rows_RD, count in zip(own, (graph.users, graph.items), strict=True)
        )
        self._held_out = _held_out(self._url, manifest)
        self._truth = _Truth.beside(self._url, manifest)

    def run(self, steps: int) -> dict[str, Any]:
        found: list[dict[str, Tensor]] = []
        for batch in self._trainer.stream.batches(0):
            if batch.step == steps:
                break
            ready = self._trainer.loader.prepare(batch, _EPOCH)
            latents, negatives, _ = self._trainer.draw_negatives(ready)
            found.append(self._of_batch(latents, negatives, ready.draws))
        world = self._trainer.world
        result: dict[str, Any] = {"kind": self._config.negatives.kind}
        for name in found[0]:
            values = torch.cat([entry[name] for entry in found]).double()
            known = ~values.isnan()
            sums = torch.stack([values[known].sum(), known.sum()])
            total, count = world.sum(sums.to(self._item_ID.device)).tolist()
            result[name] = total / count if count else None
        return {**result, "score_popularity": self._score_popularity()}

    def _of_batch(self, latents: Latents, negatives: Negatives, draws: Draws) -> dict[str, Tensor]:
        """Values per row; NaN where a row does not count."""
        batch, valid = latents.batch, latents.weight.cpu() > 0
        cosine = self._config.objective.similarity == "cosine"
        logit_BN = negatives.logits(latents.user_BD, cosine)
        positive_B1 = (latents.user_BD * latents.positive_BD).sum(1, keepdim=True)
        hardest_B = self._hardest(latents, negatives, logit_BN)
        uniform_B = non_interacted(self._graph, batch.users, batch.items, draws.uniform(1)[:, 0])
        degree, none_B = torch.from_numpy(np.log1p(self._degree)), torch.from_numpy(hardest_B < 0)
        out = {
            "false_hard_negatives": self._is_held_out(batch.users, hardest_B),
            "false_negatives": self._is_held_out(
                batch.users, self._any(latents, negatives, logit_BN)
            ),
            "chance": self._is_held_out(batch.users, uniform_B),
            "hardness": _share((logit_BN > positive_B1).cpu(), logit_BN.isfinite().cpu()),
            "negative_log_degree": degree[hardest_B].masked_fill(none_B, torch.nan),
            "uniform_log_degree": degree[uniform_B],
            "positive_log_degree": degree[batch.items],
        }
        if self._truth is not None:
            preference_B = self._truth.preference(batch.users, hardest_B)
            out["true_preference"] = preference_B.masked_fill(none_B, torch.nan)
            out["true_preference_uniform"] = self._truth.preference(batch.users, uniform_B)
        out = {name: value.masked_fill(~valid, torch.nan) for name, value in out.items()}
        if "denoising_error" in negatives.observed:
            out["denoising_error"] = negatives.observed["denoising_error"].cpu()
            out |= self._generator(latents, negatives, draws)
        return out

    def _hardest(self, latents: Latents, negatives: Negatives, logit_BN: Tensor) -> Ids:
        """The item of each row's hardest negative, int64 [B]; -1 if it has no negative."""
        if negatives.hard_BD is not None:
            made = _synthetic(latents, negatives, logit_BN, hardest=True)
            return self._nearest(latents.batch.users, made)
        parts = [] if negatives.item_BN is None else [negatives.item_BN]
        if negatives.pool is not None and negatives.pool.item_GP is not None:
            width = len(logit_BN) // latents.groups
            parts.append(negatives.pool.item_GP.repeat_interleave(width, 0))
        items = torch.cat(parts, dim=1)
        best_B, index_B = logit_BN.max(1)
        chosen = items.gather(1, index_B[:, None])[:, 0].masked_fill(best_B == -torch.inf, -1)
        found: Ids = chosen.cpu().numpy()
        return found

    def _any(self, latents: Latents, negatives: Negatives, logit_BN: Tensor) -> Ids:
        """The item of one negative per row, not the hardest: its own first, or its neighbour's
        place in the pool."""
        if negatives.hard_BD is not None:
            made = _synthetic(latents, negatives, logit_BN, hardest=False)
            return self._nearest(latents.batch.users, made)
        if negatives.item_BN is not None and negatives.item_BN.shape[1]:
            own: Ids = negatives.item_BN[:, 0].cpu().numpy()
            return own
        return latents.batch.items.reshape(latents.groups, -1)[:, ::-1].ravel()

    def _nearest(self, users: Ids, vector_BD: Tensor) -> Ids:
        """The nearest item that is no train item of the user, by cosine, in chunks; -1 of NaN."""
        items_DI = functional.normalize(self._item_ID, dim=1).t()
        train = train_interactions(self._graph)
        found = []
        for start in range(0, len(users), 256):
            cosine = vector_BD[start : start + 256] @ items_DI
            row, item = train.of(users[start : start + 256])
            cosine[torch.from_numpy(row), torch.from_numpy(item)] = -torch.inf
            found.append(cosine.argmax(1).masked_fill(cosine.isnan().any(1), -1).cpu().numpy())
        return np.concatenate(found)

    def _is_held_out(self, users: Ids, items: Ids) -> Tensor:
        hit = torch.from_numpy(self._held_out.contain(users, items)).double()
        has = self._held_out.indptr[users] < self._held_out.indptr[users + 1]
        return hit.masked_fill(~torch.from_numpy(has & (items >= 0)), torch.nan)

    def _generator(self, latents: Latents, negatives: Negatives, draws: Draws) -> dict[str, Tensor]:
        """Generate again from the same rows with fresh noise."""
        again = self._trainer.sampler.negatives(latents, draws, 1.0)
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


def _whole(rows_RD: Tensor, count: int, world: World) -> Tensor:
    """Every rank's own rows together, [count, D]: diagnostics are for datasets of that size."""
    each = len(world.share(count, 0))
    padded = rows_RD.new_zeros(each, rows_RD.shape[1], device=world.device)
    padded[: len(rows_RD)] = rows_RD
    return world.gather(padded).flatten(0, 1)[:count]


def _share(which_BN: Tensor, of_BN: Tensor) -> Tensor:
    """NaN where there is none."""
    return (which_BN & of_BN).sum(1) / of_BN.sum(1)


def _synthetic(latents: Latents, negatives: Negatives, logit_BN: Tensor, hardest: bool) -> Tensor:
    """A synthetic vector per row, [B, D]: its own or, of those that its group shares and the row
    does not leave out, the one with the highest logit or its neighbour's. NaN if there is none."""
    made_BD = negatives.hard_BD
    assert made_BD is not None
    if negatives.pool is None:
        return made_BD
    made_GSD = made_BD.unflatten(0, (latents.groups, -1))
    order_BS = logit_BN[:, -made_GSD.shape[1] :]
    rows, shared = order_BS.shape
    out_BS, row_B = order_BS == -torch.inf, torch.arange(rows, device=made_BD.device)
    if not hardest:
        distance_BS = (torch.arange(shared, device=made_BD.device) - row_B[:, None]) % shared
        order_BS = torch.where(out_BS, -torch.inf, -distance_BS.float())
    group_B = row_B // (rows // latents.groups)
    best_BD = made_GSD[group_B, order_BS.argmax(1)]
    return best_BD.masked_fill(out_BS.all(1, keepdim=True), torch.nan)


def _held_out(url: str, manifest: Manifest) -> Interactions:
    """All validation and test pairs."""
    pairs = [read_split(url, manifest, name) for name in manifest.splits if name != "train"]
    users, items = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return Interactions.from_pairs(users, items, (manifest.users, manifest.items))


class _Truth:
    """The causal model that ``prepare --synthetic`` leaves beside its dataset, by row."""

    def __init__(self, users: Any, items: Any, quality: Any, offset: float) -> None:
        self._users, self._items, self._quality, self._offset = users, items, quality, offset

    @classmethod
    def beside(cls, url: str, manifest: Manifest) -> "_Truth | None":
        if not storage.exists(f"{url}/truth/model.parquet"):
            return None

        def read(name: str) -> Any:
            with storage.open_read(f"{url}/truth/{name}.parquet") as file:
                return pq.read_table(file)

        users, items = read("users"), read("items")
        rows = [read_ids(url, manifest, side)["id"].to_numpy() for side in ("users", "items")]
        factors = [
            np.stack(table["factors"].to_pylist())[row]
            for table, row in zip((users, items), rows, strict=True)
        ]
        quality = items["quality"].to_numpy()[rows[1]]
        return cls(factors[0], factors[1], quality, read("model")["offset"][0].as_py())

    def preference(self, users: Ids, items: Ids) -> Tensor:
        """The probability that each user likes its item, [B]."""
        logits = (self._users[users] * self._items[items]).sum(1)
        return torch.from_numpy(logits + self._quality[items] + self._offset).sigmoid()


def read_diagnostics(run_url: str) -> dict[str, Any] | None:
    path = f"{run_url}/{FILE}"
    return json.loads(storage.read_text(path)) if storage.exists(path) else None
