"""Rows a second of the train stream against a bare pyarrow scan of the same columns.

    python -m benchmarks.streaming --data data/power-law-1000000

One process. Both read every row of the train split from local files; ours also checks pages and
ids, shuffles, and deals the rows into batches.
"""

import argparse

import pyarrow.parquet as pq

from benchmarks.machine import alternated, machine, ratio, report
from cnsdiff_dist import storage
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.plan import EpochPlan
from cnsdiff_dist.data.schema import INTERACTION_SCHEMA
from cnsdiff_dist.data.stream import TrainStream
from cnsdiff_dist.world import join_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared dataset, on a local disk")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    join_world(60)  # as in training: it says how memory is reused
    manifest, data = load_manifest(args.data), Config().data
    rows = manifest.train.rows
    plan = EpochPlan(rows, args.batch, data.streams, data.block_rows, 0)
    streams = list(range(data.streams))
    paths = [storage.join(args.data, shard.path) for shard in manifest.train.shards]

    def ours() -> None:
        stream = TrainStream(args.data, manifest, plan, streams, data.prefetch_blocks)
        seen = sum(int(batch.valid_rows) for batch in stream.batches(0))
        assert seen == rows

    def scan() -> None:
        seen = 0
        for path in paths:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=INTERACTION_SCHEMA.names)
                seen += table.num_rows
        assert seen == rows

    seconds = alternated({"ours": ours, "scan": scan}, args.rounds)
    report(
        {
            "benchmark": "streaming",
            "machine": machine(),
            "rows": rows,
            "batch": args.batch,
            "rows_per_second": {name: round(rows / min(v)) for name, v in seconds.items()},
            "share_of_scan": round(ratio(seconds, "scan", "ours"), 3),
        }
    )


if __name__ == "__main__":
    main()
