"""The embedding tables, sharded over the ranks by TorchRec and updated by FBGEMM.

Besides ``cluster/table_placement.py``, no other module imports torchrec.distributed.

Shapes: n looked-up rows of a table, R table rows of this rank, D embedding dimension.
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

from cnsdiff_dist.distributed.embedding_tables import TABLES, initial_rows, unallocated_tables
from cnsdiff_dist.distributed.world import World, to_device
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.sections import Tables

_ROWS_AT_A_TIME = 1 << 16
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

    ``backward`` updates the tables, so a step has one lookup and one backward. TorchRec divides the
    gradient by the world size: if each rank scales its loss to a mean over the global batch, the
    tables see the gradient of that mean.

    Args:
        streams: the number of canonical streams, which every world size divides.

    Raises:
        UserError: the optimizer or the placement needs a GPU and there is none.
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
        self.rows, self.dim = {"user": users, "item": items}, dim
        self._world, self._lr = world, config.lr
        _refuse_without_gpu(config, world)
        collection = collection_to_shard(users, items, dim, config, streams)
        self._model = _sharded(collection, config, world)
        if world.device.type == "cpu":
            _pool_single_rows(self._model)
        if world.size == 1:
            _skip_permutation(self._model)
        self._initialise(config.init_std, seed)

    def _initialise(self, std: float, seed: int) -> None:
        for table, sharded in self.weights().items():
            for shard in sharded.local_shards():
                first_row, first_column = shard.metadata.shard_offsets
                rows, columns = shard.metadata.shard_sizes
                # In pieces, because a shard may fill the memory.
                for at in range(0, rows, _ROWS_AT_A_TIME):
                    start = first_row + at
                    stop = first_row + min(at + _ROWS_AT_A_TIME, rows)
                    initial = initial_rows(table, start, stop, self.dim, std, seed)
                    part = initial[:, first_column : first_column + columns]
                    shard.tensor[at : at + _ROWS_AT_A_TIME].detach().copy_(part)

    def lookup(self, users: Tensor, items: Tensor) -> Tensor:
        """Look up table rows, those of the users first. Collective.

        Args:
            users, items: distinct ids, int64 [n_u] and [n_i]. The caller has checked them with
                :meth:`refuse_out_of_range`.

        Returns:
            [n_u + n_i, D].
        """
        features = KeyedJaggedTensor(
            keys=list(TABLES),
            values=torch.cat([users, items]),
            lengths=to_device(torch.tensor([len(users), len(items)]), users.device),
        )
        found = self._model(features)
        return _concatenated([found[table].values() for table in TABLES]).view(-1, self.dim)

    @torch.no_grad()
    def own_rows(self, table: str) -> Tensor:
        """Return the rows ``world.own_rows(rows)`` of a table, float32 [R, D] on the host.

        They are the same rows however the table is sharded. Collective.
        """
        own, device = self._world.own_rows(self.rows[table]), self._world.device
        found = torch.empty(len(own), self.dim)
        none = torch.empty(0, dtype=torch.int64, device=device)
        for start in range(0, -(-self.rows[table] // self._world.size), _ROWS_AT_A_TIME):
            ids = own[start : start + _ROWS_AT_A_TIME]  # perhaps none: lookup is collective
            rows = torch.arange(ids.start, ids.stop, device=device)
            both = (rows, none) if table == "user" else (none, rows)
            found[start : start + len(ids)] = self.lookup(*both)
        return found

    def refuse_out_of_range(self, table: str, ids: npt.NDArray[np.int64]) -> None:
        """Check that ids are rows of the table; TorchRec would train another row, or hang.

        The ids are on the host, so that the check does not wait for a device.

        Raises:
            UserError: an id is not a row of the table.
        """
        if len(ids) and (ids.min() < 0 or ids.max() >= self.rows[table]):
            raise UserError(f"{table} ids must lie in 0..{self.rows[table] - 1}")

    def scale_lr(self, factor: float) -> None:
        """Set the learning rate of the next updates to ``factor`` x the configured one."""
        optimizer = self._model.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = self._lr * factor
        optimizer.step()  # only passes the rate to the kernels: the update is in backward

    def weights(self) -> dict[str, Any]:
        """Return each table's ShardedTensor [rows, D]; it shares memory with the live table."""
        state = self._model.state_dict()
        return {table: state[f"embeddings.{table}.weight"] for table in TABLES}

    def state(self) -> dict[str, Any]:
        """Return the weights and the optimizer state that a checkpoint holds, all ShardedTensors.

        A rank lists the optimizer state only of tables that it has rows of. Loading a checkpoint
        writes into these tensors in place.
        """
        optimizer = {
            key: value
            for entry in self._model.fused_optimizer.state_dict()["state"].values()
            for key, value in entry.items()
        }
        return {"weights": self.weights(), "optimizer": optimizer}


def collection_to_shard(
    users: int, items: int, dim: int, config: Tables, streams: int
) -> EmbeddingCollection:
    """Describe the tables on the meta device, with the optimizer that is fused into backward.

    The number of rows is rounded up to a multiple of the streams. Every world size divides the
    streams, so every rank has rows, and the padding, which is never looked up, is the same at
    any world size.
    """
    rows = [-(-count // streams) * streams for count in (users, items)]
    collection = unallocated_tables(rows[0], rows[1], dim, config)
    options = {"lr": config.lr}
    if config.optimizer != "sgd":
        options["eps"] = config.eps
    apply_optimizer_in_backward(_OPTIMIZERS[config.optimizer], collection.parameters(), options)
    return collection


def _sharded(
    collection: EmbeddingCollection, config: Tables, world: World
) -> DistributedModelParallel:
    # _pool_single_rows needs a kernel per table.
    fused_params = {USE_ONE_TBE_PER_TABLE: world.device.type == "cpu"}
    sharder: Any = EmbeddingCollectionSharder(fused_params=fused_params)
    plan = construct_module_sharding_plan(
        collection,
        _shardings(config, world.size),
        sharder=sharder,
        world_size=world.size,
        local_size=world.local_size,
        device_type=world.device.type,
    )
    return DistributedModelParallel(
        collection,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=world.device,
        plan=ShardingPlan(plan={"": plan}),
        sharders=[sharder],
        init_data_parallel=False,
    )


def _concatenated(parts: list[Tensor]) -> Tensor:
    """Return the tables' rows one after the other, without a copy where that is possible.

    TorchRec splits one tensor among the tables. To concatenate the parts again would copy the
    tensor and, in backward, its gradient, which is a tenth of a step. If the parts lie in the
    split tensor one after the other, that tensor is returned; it may be flat.
    """
    whole, end = parts[0]._base, 0
    if whole is None:
        return torch.cat(parts)
    for part in parts:
        if part._base is not whole or part.storage_offset() != end or not part.is_contiguous():
            return torch.cat(parts)
        if not _is_view_for_autograd(part, whole):
            return torch.cat(parts)
        end += part.numel()
    return whole if end == whole.numel() else torch.cat(parts)


def _is_view_for_autograd(part: Tensor, whole: Tensor) -> bool:
    """Return whether only views lie between ``whole`` and ``part`` in the autograd graph.

    A function with its own backward, such as an exchange between ranks, would be left out if
    ``whole`` were used instead.
    """
    node = part.grad_fn
    while node is not whole.grad_fn:
        if node is None or node.name() not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return True


def _pool_single_rows(model: DistributedModelParallel) -> None:
    """Have FBGEMM's CPU kernels sum bags of one row instead of looking up single rows.

    The results are the same. The backward for single rows keeps each row's gradient in a hash
    map of vectors and takes 5 us for a row of a large table; the one for bags takes 0.6 us
    (`python -m benchmarks.lookup`). Each table needs its own kernel, because the outputs for bags
    of several tables would lie side by side.
    """

    def one_row_per_bag(_: torch.nn.Module, args: tuple[()], kwargs: dict[str, Tensor]) -> Any:
        indices = kwargs["indices"]
        return args, {**kwargs, "offsets": torch.arange(len(indices) + 1, dtype=indices.dtype)}

    sharded: Any = model.module
    for lookup in sharded._lookups:  # a plain list: TorchRec does not register these modules
        for kernel in (part.emb_module for part in lookup._emb_modules):
            kernel.pooling_mode = PoolingMode.SUM
            kernel.register_forward_pre_hook(one_row_per_bag, with_kwargs=True)


def _skip_permutation(model: DistributedModelParallel) -> None:
    """Skip the permutation of the rows from their owners' order to that of the ids.

    In a world of one rank both orders are the same, but the permutation costs a copy in forward
    and in backward, and in backward also a scatter.
    """
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


def _shardings(config: Tables, world_size: int) -> dict[str, Any]:
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
