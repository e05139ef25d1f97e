"""Shards the embedding tables. The only module that imports torchrec.distributed.

Shapes: n looked-up rows of a table, D embedding dim.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim import SGD, Adagrad, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cnsdiff_dist.config import Tables
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.models.tables import TABLES, embedding_tables, initial_rows
from cnsdiff_dist.world import World

_OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "sgd": SGD}


class ShardedTables:
    """The user and item tables over all ranks, with FBGEMM's optimizer fused into backward.

    The update happens inside ``backward``, so a step has one lookup and one backward.
    TorchRec divides the gradient by the world size: with each rank's loss scaled to a mean
    over the global batch, the tables see the gradient of that mean.
    """

    def __init__(
        self, users: int, items: int, dim: int, config: Tables, seed: int, world: World
    ) -> None:
        self.rows = {"user": users, "item": items}
        for table, rows in self.rows.items():
            if config.sharding == "row_wise" and -(-rows // world.size) * (world.size - 1) >= rows:
                raise UserError(
                    f"{world.size} ranks are too many for the {table} table's {rows} rows; "
                    "use fewer, or tables.sharding=table_wise"
                )
        self._lr = config.lr
        collection = embedding_tables(users, items, dim)
        options = {"lr": config.lr} if config.optimizer == "sgd" else {
            "lr": config.lr, "eps": config.eps,
        }  # fmt: skip
        apply_optimizer_in_backward(_OPTIMIZERS[config.optimizer], collection.parameters(), options)
        sharder: Any = EmbeddingCollectionSharder()
        layout = _layout(config.sharding, world.size)
        plan = construct_module_sharding_plan(
            collection, layout, sharder=sharder, world_size=world.size,
            local_size=world.local_size, device_type=world.device.type,
        )  # fmt: skip
        self._model = DistributedModelParallel(
            collection,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=world.device,
            plan=ShardingPlan(plan={"": plan}),
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._initialise(dim, config.init_std, seed)

    def _initialise(self, dim: int, std: float, seed: int) -> None:
        for table, sharded in self.weights().items():
            for shard in sharded.local_shards():
                (row, column), (rows, columns) = (
                    shard.metadata.shard_offsets,
                    shard.metadata.shard_sizes,
                )
                first = initial_rows(table, row, row + rows, dim, std, seed)
                shard.tensor.detach().copy_(first[:, column : column + columns])

    def lookup(self, users: Tensor, items: Tensor) -> Tensor:
        """Table rows of distinct ids in range, users first: int64 [n_u], [n_i] -> [n_u + n_i, D].

        Whoever makes the ids passes them through :meth:`refuse_out_of_range` first.
        """
        features = KeyedJaggedTensor(
            keys=list(TABLES),
            values=torch.cat([users, items]),
            lengths=torch.tensor([len(users), len(items)], device=users.device),
        )
        found = self._model(features)
        return torch.cat([found[table].values() for table in TABLES])

    def refuse_out_of_range(self, table: str, ids: npt.NDArray[np.int64]) -> None:
        """
        Raises:
            UserError: an id of these (on the host, so that no device is waited for) is not a
                row of the table. TorchRec would train some other row, or hang.
        """
        if len(ids) and (ids.min() < 0 or ids.max() >= self.rows[table]):
            raise UserError(f"{table} ids must lie in 0..{self.rows[table] - 1}")

    def scale_lr(self, factor: float) -> None:
        """Set the learning rate of the next updates to ``factor`` x the configured one."""
        optimizer = self._model.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = self._lr * factor
        optimizer.step()  # hands the rate to the kernels; the update is in backward

    def weights(self) -> dict[str, Any]:
        """Table name -> ShardedTensor [rows, D], sharing memory with the live table."""
        state = self._model.state_dict()
        return {table: state[f"embeddings.{table}.weight"] for table in TABLES}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: weights and optimizer state, all ShardedTensors.

        A rank lists the optimizer state of the tables it has rows of. Loading writes into
        these same tensors in place.
        """
        optimizer = {
            key: value
            for entry in self._model.fused_optimizer.state_dict()["state"].values()
            for key, value in entry.items()
        }
        return {"weights": self.weights(), "optimizer": optimizer}


def _layout(kind: str, world_size: int) -> dict[str, Any]:
    if kind == "row_wise":
        return {table: row_wise() for table in TABLES}
    if kind == "table_wise":
        return {table: table_wise(index % world_size) for index, table in enumerate(TABLES)}
    return {table: column_wise(list(range(world_size))) for table in TABLES}
