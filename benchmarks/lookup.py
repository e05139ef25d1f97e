"""A lookup and update through the sharded tables against bare FBGEMM.

    python -m benchmarks.lookup [--rows 1000000] [--ids 20000]

One process, one thread. Both update the same number of rows by rowwise Adagrad; the bare
kernel gets its ids ready-made.
"""

import argparse

import numpy as np
import torch

from benchmarks.machine import alternated, machine, ratio, report
from cnsdiff_dist.cli import quiet
from cnsdiff_dist.config import Tables
from cnsdiff_dist.parallel.sparse import ShardedTables
from cnsdiff_dist.world import join_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each table")
    parser.add_argument("--ids", type=int, default=20_000, help="distinct ids of each table")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    tables = ShardedTables(args.rows, args.rows, args.dim, Tables(), 8, 0, join_world(60))
    bare = _bare(args.rows, args.dim)
    generator = np.random.default_rng(0)

    def draw() -> torch.Tensor:
        return torch.from_numpy(generator.choice(args.rows, args.ids, replace=False))

    gradient = torch.randn(2 * args.ids, args.dim)
    ids = [(draw(), draw()) for _ in range(args.rounds + 1)]
    of_ours, of_bare = iter(ids), iter(ids)

    def ours() -> None:
        tables.lookup(*next(of_ours)).backward(gradient)

    def theirs() -> None:
        both = next(of_bare)
        offsets = torch.tensor([0, args.ids, 2 * args.ids])
        bare(torch.cat(both), offsets).backward(gradient)

    seconds = alternated({"ours": ours, "bare": theirs}, args.rounds)
    report(
        {
            "benchmark": "lookup",
            "machine": machine(),
            "rows": args.rows,
            "ids": 2 * args.ids,
            "dim": args.dim,
            "microseconds_per_id": {
                name: round(1e6 * float(np.median(values)) / (2 * args.ids), 3)
                for name, values in seconds.items()
            },
            "share_of_bare_fbgemm": round(ratio(seconds, "bare", "ours"), 3),
        }
    )


def _bare(rows: int, dim: int) -> torch.nn.Module:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = (rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
    operator = SplitTableBatchedEmbeddingBagsCodegen(
        [table, table], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.05,
        pooling_mode=PoolingMode.NONE,
    )  # fmt: skip
    for weights in operator.split_embedding_weights():
        weights.data.normal_()
    return operator


if __name__ == "__main__":
    main()
