"""One update on a global batch: encode, make negatives, rank, update. The whole method.

Shapes: B rows of this rank, M candidates of a row, N negatives of a row (own and pool's),
D embedding dimension.
"""

from typing import Any

import torch
from torch import Tensor

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.distributed.dense_engine import DenseEngine
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models import losses
from cnsdiff_dist.objectives.registry import make_objective
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives
from cnsdiff_dist.training.components import make_recommender, make_sampler
from cnsdiff_dist.training.finite import FiniteGate
from cnsdiff_dist.training.loader import StepInputs


class TrainStep:
    """All that is trained, and how one step updates it. Every method is collective.

    Args:
        environments: popularity buckets of the dataset.
    """

    def __init__(self, config: Config, graph: GraphArrays, environments: int, world: World) -> None:
        self._config, self._world = config, world
        self.recommender = make_recommender(config, graph, world)
        self.sampler = make_sampler(config, graph, environments, world)
        rows = config.train.batch // world.size
        self.dense = DenseEngine(self.sampler.network, config.generator, rows)
        self.sampler.network = self.dense.network  # ZeRO wants the module called through it
        self._objective = make_objective(config.objective)
        self.gate = FiniteGate(world)

    def __call__(self, inputs: StepInputs, progress: float) -> dict[str, Tensor]:
        """Update tables and generator.

        Args:
            progress: share of the whole training that is done, 0 to 1.

        Returns:
            This rank's part of each observed mean over the global batch, on the device. Nothing
            when the loss or the gradient of a rank, named in ``gate.bad_ranks``, is not finite:
            then all ranks leave the step out together.
        """
        config = self._config
        encoded, negatives, l2_B = self.draw_negatives(inputs, progress)
        ranking_B, hardness_B = self._rank(encoded, negatives)
        terms = {config.objective.kind: ranking_B, "l2": config.loss.l2 * l2_B, **negatives.terms}
        if config.loss.contrastive:
            terms["contrastive"] = self._contrast(encoded, negatives, inputs.draws)
        share_B = encoded.weight_B / inputs.batch.valid_rows
        loss = torch.stack(list(terms.values())).sum(0) @ share_B
        self.gate.loss = loss.detach()
        # The engine averages gradients over ranks, but this rank's loss is a part of a sum. Within
        # backward the gate looks at the gradient, and FBGEMM updates the tables.
        self.dense.backward(loss * self._world.size)
        if self.gate.bad_ranks:
            self.dense.discard_gradients()
            return {}
        self.dense.step()
        observed = {"loss": loss.detach(), "rows": encoded.weight_B.sum()}
        for name, value_B in (terms | {"hardness": hardness_B} | negatives.observed).items():
            observed[name] = value_B.detach() @ share_B
        return observed

    def draw_negatives(
        self, inputs: StepInputs, progress: float
    ) -> tuple[EncodedBatch, Negatives, Tensor]:
        """A batch encoded, its negatives, and the L2 of its table rows [B]."""
        inputs = inputs.to(self._world.device)
        encoded, l2_B = self._encode(inputs)
        return encoded, self.sampler.negatives(encoded, inputs.draws, progress), l2_B

    def _encode(self, inputs: StepInputs) -> tuple[EncodedBatch, Tensor]:
        """Look up and encode users, positives and candidates in one go."""
        rows, per_row = inputs.candidates.shape
        sizes = [rows, rows, rows * per_row]
        h_BD, half_square_B = self.recommender.encode(inputs.block, self.gate)
        user_BD, item_BD = self.recommender.scored(*h_BD.split([rows, rows + rows * per_row]))
        positive_BD, candidate_BD = item_BD.split(sizes[1:])
        encoded = EncodedBatch(
            batch=inputs.batch,
            candidates=inputs.candidates,
            user_BD=user_BD,
            positive_BD=positive_BD,
            candidate_BMD=candidate_BD.view(rows, per_row, self._config.model.dim),
            positive_item_B=inputs.item_B,
            candidate_item_BM=inputs.candidate_BM,
            environment_B=inputs.environment_B,
            weight_B=inputs.weight_B,
            groups=len(inputs.batch.streams),
        )
        user_l2_B, positive_l2_B, candidate_l2 = half_square_B.split(sizes)
        candidate_l2_B = candidate_l2.view(rows, per_row).sum(1) / max(per_row, 1)
        return encoded, user_l2_B + positive_l2_B + candidate_l2_B

    def _rank(self, encoded: EncodedBatch, negatives: Negatives) -> tuple[Tensor, Tensor]:
        """The objective [B], and the share of a row's negatives that outscore its positive."""
        positive_B = (encoded.user_BD * encoded.positive_BD).sum(1)
        cosine = self._config.objective.similarity == "cosine"
        logit_BN = negatives.logits(encoded.user_BD, cosine)
        with torch.no_grad():
            # Straight to float: a mean over bool costs four times as much on a CPU.
            harder_BN = torch.gt(logit_BN, positive_B[:, None], out=torch.empty_like(logit_BN))
        return self._objective(positive_B, logit_BN), harder_BN.mean(1)

    def _contrast(self, encoded: EncodedBatch, negatives: Negatives, draws: Draws) -> Tensor:
        """InfoNCE between a positive and its noised self; the noise is relative to its length."""
        loss, positive_BD = self._config.loss, encoded.positive_BD
        with torch.no_grad():
            length_B1 = positive_BD.norm(dim=1, keepdim=True) / positive_BD.shape[1] ** 0.5
            noise_BD = loss.positive_noise * length_B1 * draws.normal(positive_BD.shape[1])
        own_BND = negatives.vector_BND
        others = negatives.contrast or ((own_BND[:, 0],) if own_BND.shape[1] else (positive_BD,))
        term_B = losses.info_nce(
            positive_BD,
            positive_BD + noise_BD,
            list(others),
            encoded.weight_B,
            encoded.groups,
            loss.temperature,
        )
        return loss.contrastive * term_B

    def set_learning_rates(self, step: int) -> None:
        """Warm both learning rates up linearly over ``train.warmup_steps``."""
        warmup = self._config.train.warmup_steps
        if step <= warmup:
            factor = min(1.0, (step + 1) / max(warmup, 1))
            self.recommender.tables.scale_lr(factor)
            self.dense.scale_lr(factor)

    def state(self) -> dict[str, Any]:
        """The checkpoint tree: table shards, which stay live, and a copy of the dense part."""
        return {"tables": self.recommender.tables.state(), "dense": self.dense.state()}

    def load_dense(self, state: dict[str, Any]) -> None:
        """Take the dense part of a tree that :meth:`state` made and a checkpoint filled; the
        table shards are filled already."""
        self.dense.load_state(state["dense"])
