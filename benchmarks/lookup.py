"""A lookup and update through the sharded tables against FBGEMM's kernels alone.

    python -m benchmarks.lookup [--rows 1000000] [--ids 20000]

One process, one thread. All update the same number of rows by rowwise Adagrad. The kernels alone
get their ids ready-made, and look them up one by one (``single``) or as bags of one (``bags``).
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.machine import alternated, machine, ratio, report
from cnsdiff_dist.cli import quiet
from cnsdiff_dist.distributed.embedding_tables import TABLES
from cnsdiff_dist.distributed.sharded_tables import ShardedTables
from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.sections import Tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each table")
    parser.add_argument("--ids", type=int, default=20_000, help="distinct ids of each table")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    seconds = alternated(_calls(args), args.rounds)
    ids = 2 * args.ids
    microseconds = {name: 1e6 * float(np.median(values)) for name, values in seconds.items()}
    shares = {name: round(ratio(seconds, name, "ours"), 3) for name in ("single", "bags")}
    report(
        {
            "benchmark": "lookup",
            "machine": machine(),
            "rows": args.rows,
            "ids": ids,
            "dim": args.dim,
            "microseconds_per_id": {n: round(value / ids, 3) for n, value in microseconds.items()},
            "share_of_bare_fbgemm": shares,
        }
    )


def _calls(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The calls to compare; each takes fresh ids every time, and all take the same ones."""
    tables = ShardedTables(args.rows, args.rows, args.dim, Tables(), 8, 0, join_world(60))
    single = _bare(2, args.rows, args.dim, "NONE")
    bags = [_bare(1, args.rows, args.dim, "SUM") for _ in TABLES]
    generator = np.random.default_rng(0)

    def draw() -> torch.Tensor:
        return torch.from_numpy(generator.choice(args.rows, args.ids, replace=False))

    gradient = torch.randn(2 * args.ids, args.dim)
    ids = [(draw(), draw()) for _ in range(args.rounds + 1)]
    of_ours, of_single, of_bags = iter(ids), iter(ids), iter(ids)

    def ours() -> None:
        tables.lookup(*next(of_ours)).backward(gradient)

    def one_by_one() -> None:
        offsets = torch.tensor([0, args.ids, 2 * args.ids])
        single(torch.cat(next(of_single)), offsets).backward(gradient)

    def as_bags() -> None:
        offsets = torch.arange(args.ids + 1)
        for kernel, some, part in zip(bags, next(of_bags), gradient.chunk(2)):
            kernel(some, offsets).backward(part)

    return {"ours": ours, "single": one_by_one, "bags": as_bags}


def _bare(tables: int, rows: int, dim: int, pooling: str) -> torch.nn.Module:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = (rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
    operator = SplitTableBatchedEmbeddingBagsCodegen(
        [table] * tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
        pooling_mode=PoolingMode[pooling],
    )
    for weights in operator.split_embedding_weights():
        weights.data.normal_()
    return operator


if __name__ == "__main__":
    main()
