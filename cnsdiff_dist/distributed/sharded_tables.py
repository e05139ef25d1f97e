"""Shards the embedding tables. The only module that imports torchrec.distributed.

Shapes: n looked-up rows of a table, D embedding dim.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_sharding import USE_ONE_TBE_PER_TABLE
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim import SGD, Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cnsdiff_dist.config import Tables
from cnsdiff_dist.distributed.embedding_tables import TABLES, embedding_tables, initial_rows
from cnsdiff_dist.distributed.world import World, to_device
from cnsdiff_dist.errors import UserError

_ROWS = 1 << 16
_VIEWS = ("SplitWithSizesBackward0", "ViewBackward0", "UnsafeViewBackward0")
_OPTIMIZERS = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": Adagrad,
    "sgd": SGD,
    "adam": Adam,
    "partial_rowwise_adam": PartialRowWiseAdam,
}
KERNELS = {
    "device": EmbeddingComputeKernel.FUSED.value,
    "uvm": EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
}


class ShardedTables:
    """The user and item tables over all ranks, with FBGEMM's optimizer fused into backward.

    The update happens inside ``backward``, so a step has one lookup and one backward.
    TorchRec divides the gradient by the world size: with each rank's loss scaled to a mean
    over the global batch, the tables see the gradient of that mean.
    """

    def __init__(
        self,
        users: int,
        items: int,
        dim: int,
        config: Tables,
        streams: int,
        seed: int,
        world: World,
    ) -> None:
        self.rows, self.dim, self._world = {"user": users, "item": items}, dim, world
        self._lr = config.lr
        _refuse_without_gpu(config, world)
        collection = described(users, items, dim, config, streams)
        on_cpu = world.device.type == "cpu"
        sharder: Any = EmbeddingCollectionSharder(fused_params={USE_ONE_TBE_PER_TABLE: on_cpu})
        plan = construct_module_sharding_plan(
            collection, _layout(config, world.size), sharder=sharder, world_size=world.size,
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
        if on_cpu:
            _pool_single_rows(self._model)
        if world.size == 1:
            _keep_order(self._model)
        self._initialise(config.init_std, seed)

    def _initialise(self, std: float, seed: int) -> None:
        for table, sharded in self.weights().items():
            for shard in sharded.local_shards():
                first_row, first_column = shard.metadata.shard_offsets
                rows, columns = shard.metadata.shard_sizes
                for at in range(0, rows, _ROWS):  # a piece at a time: a shard may fill the memory
                    start, stop = first_row + at, first_row + min(at + _ROWS, rows)
                    first = initial_rows(table, start, stop, self.dim, std, seed)
                    part = first[:, first_column : first_column + columns]
                    shard.tensor[at : at + _ROWS].detach().copy_(part)

    def lookup(self, users: Tensor, items: Tensor) -> Tensor:
        """Table rows of distinct ids in range, users first: int64 [n_u], [n_i] -> [n_u + n_i, D].

        Whoever makes the ids passes them through :meth:`refuse_out_of_range` first.
        """
        features = KeyedJaggedTensor(
            keys=list(TABLES),
            values=torch.cat([users, items]),
            lengths=to_device(torch.tensor([len(users), len(items)]), users.device),
        )
        found = self._model(features)
        return _joined([found[table].values() for table in TABLES]).view(-1, self.dim)

    @torch.no_grad()
    def own_rows(self, table: str) -> Tensor:
        """The rows ``world.own(rows)`` of a table, float32 [R, D] on the host, however it is
        sharded. Collective."""
        own, device = self._world.own(self.rows[table]), self._world.device
        found = torch.empty(len(own), self.dim)
        none = torch.empty(0, dtype=torch.int64, device=device)
        for start in range(0, -(-self.rows[table] // self._world.size), _ROWS):
            ids = own[start : start + _ROWS]  # may be none, but every rank must look
            rows = torch.arange(ids.start, ids.stop, device=device)
            both = (rows, none) if table == "user" else (none, rows)
            found[start : start + len(ids)] = self.lookup(*both)
        return found

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


def described(
    users: int, items: int, dim: int, config: Tables, streams: int
) -> EmbeddingCollection:
    """The tables on the meta device, with the optimizer that is fused into their backward.

    Their rows are made a multiple of the streams: every world size divides those, so no rank is
    without rows, and the padding, which nobody looks up, is the same at any world size.
    """
    rows = [-(-count // streams) * streams for count in (users, items)]
    collection = embedding_tables(rows[0], rows[1], dim, config)
    options = {"lr": config.lr} if config.optimizer == "sgd" else {
        "lr": config.lr, "eps": config.eps,
    }  # fmt: skip
    apply_optimizer_in_backward(_OPTIMIZERS[config.optimizer], collection.parameters(), options)
    return collection


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other, perhaps flat.

    TorchRec splits one tensor among the tables. To join its parts again would copy it, and later
    its gradient: a tenth of a step.
    """
    whole, end = parts[0]._base, 0
    if whole is None:
        return torch.cat(parts)
    for part in parts:
        if part._base is not whole or part.storage_offset() != end or not part.is_contiguous():
            return torch.cat(parts)
        if not _only_viewed(part, whole):
            return torch.cat(parts)
        end += part.numel()
    return whole if end == whole.numel() else torch.cat(parts)


def _only_viewed(part: Tensor, whole: Tensor) -> bool:
    """Whether autograd, too, sees ``part`` as a part of ``whole``: between them are but views, and
    no function with a backward of its own, such as an exchange between ranks."""
    node = part.grad_fn
    while node is not whole.grad_fn:
        if node is None or node.name() not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return True


def _pool_single_rows(model: DistributedModelParallel) -> None:
    """Have FBGEMM's CPU kernels sum bags of one row instead of looking rows up one by one.

    The numbers are the same. But its backward for single rows keeps each row's gradient in a
    hash map of vectors: 5 us a row of a large table, against 0.6 us of the one for bags
    (`python -m benchmarks.lookup`). Needs a table's kernel to itself: the outputs of bags of
    several tables would lie side by side.
    """

    def a_bag_a_row(_: torch.nn.Module, args: tuple[()], kwargs: dict[str, Tensor]) -> Any:
        indices = kwargs["indices"]
        return args, {**kwargs, "offsets": torch.arange(len(indices) + 1, dtype=indices.dtype)}

    sharded: Any = model.module
    for lookup in sharded._lookups:  # no modules of the model: TorchRec keeps them in a list
        for kernel in (part.emb_module for part in lookup._emb_modules):
            kernel.pooling_mode = PoolingMode.SUM
            kernel.register_forward_pre_hook(a_bag_a_row, with_kwargs=True)


def _keep_order(model: DistributedModelParallel) -> None:
    """Spare a world of one the permutation of rows from their owners' order into that of the ids:
    with one owner the two are the same, but each way it costs a copy, and backward a scatter."""
    sharded: Any = model.module
    compute = sharded.compute_and_output_dist

    def without_permutation(context: Any, features: Any) -> Any:
        for sharding in context.sharding_contexts:
            sharding.unbucketize_permute_tensor = None
        return compute(context, features)

    sharded.compute_and_output_dist = without_permutation


def _refuse_without_gpu(config: Tables, world: World) -> None:
    if world.device.type == "cuda":
        return
    if "adam" in config.optimizer:
        raise UserError(
            f"tables.optimizer={config.optimizer} needs a GPU: FBGEMM fuses no Adam on CPUs; use "
            "rowwise_adagrad"
        )
    if config.placement != "device":
        raise UserError(f"tables.placement={config.placement} needs a GPU; on a CPU use device")


def _layout(config: Tables, world_size: int) -> dict[str, Any]:
    kernel = KERNELS[config.placement]
    if config.sharding == "row_wise":
        return {table: row_wise(compute_kernel=kernel) for table in TABLES}
    if config.sharding == "table_wise":
        return {
            table: table_wise(index % world_size, compute_kernel=kernel)
            for index, table in enumerate(TABLES)
        }
    ranks = list(range(world_size))
    return {table: column_wise(ranks, compute_kernel=kernel) for table in TABLES}
