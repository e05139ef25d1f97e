"""Rows a second of the train stream against pyarrow scans of the same columns.

    python -m benchmarks.streaming --data data/power-law-1000000
    AWS_ENDPOINT_URL=... python -m benchmarks.streaming --data s3://bucket/power-law-1000000

One process. All read every row of the train split, from local files or from an S3 server. Ours
also checks bytes and ids, shuffles, and deals the rows into batches. The scans only decode, with
Arrow's own file systems: ``scan`` reads row group by row group with Arrow's threads (on S3 with
``pre_buffer``), ``threaded_scan`` with as many readers at once as ours has.
"""

import argparse
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import pyarrow.parquet as pq
from pyarrow import fs

from benchmarks.machine import alternated, machine, ratio, report
from cnsdiff_dist import storage
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.epoch_plan import EpochPlan
from cnsdiff_dist.data.schema import INTERACTION_SCHEMA, Manifest
from cnsdiff_dist.data.stream import TrainStream, read_ahead_threads
from cnsdiff_dist.distributed.world import join_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared dataset, a path or s3:// URL")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    join_world(60)  # as in training, since it sets how freed memory is reused
    manifest = load_manifest(args.data)
    seconds = alternated(_readers(args.data, manifest, args.batch), args.rounds)
    rows = manifest.train.rows
    report(
        {
            "benchmark": "streaming",
            "machine": machine(),
            "store": storage.protocol(args.data),
            "rows": rows,
            "bytes": sum(shard.bytes for shard in manifest.train.shards),
            "batch": args.batch,
            "read_ahead_threads": read_ahead_threads(args.data),
            "rows_per_second": {name: round(rows / min(v)) for name, v in seconds.items()},
            "share_of_scan": round(ratio(seconds, "scan", "ours"), 3),
            "share_of_threaded_scan": round(ratio(seconds, "threaded_scan", "ours"), 3),
        }
    )


def _readers(url: str, manifest: Manifest, batch: int) -> dict[str, Callable[[], None]]:
    rows, data = manifest.train.rows, Config().data
    plan = EpochPlan(rows, batch, data.streams, data.block_rows, 0)
    row_groups = [
        (shard.path, index)
        for shard in manifest.train.shards
        for index in range(len(shard.row_groups))
    ]

    def ours() -> None:
        # A new stream each time, so that it reads the footers each time, as the scans do.
        stream = TrainStream(url, manifest, plan, list(range(data.streams)), data.prefetch_blocks)
        assert sum(int(batch.valid_rows) for batch in stream.batches(0)) == rows

    def scan() -> None:
        scanner = _ArrowScan(url, use_threads=True)
        assert sum(scanner.read(path, index) for path, index in row_groups) == rows

    def threaded_scan() -> None:
        scanner = _ArrowScan(url, use_threads=False)
        with ThreadPoolExecutor(read_ahead_threads(url)) as threads:
            assert sum(threads.map(scanner.read, *zip(*row_groups, strict=True))) == rows

    return {"ours": ours, "scan": scan, "threaded_scan": threaded_scan}


class _ArrowScan(threading.local):
    """Reads row groups with Arrow alone; each thread has its own open files."""

    def __init__(self, url: str, use_threads: bool) -> None:
        self._local, self._use_threads = storage.is_local(url), use_threads
        self._files: dict[str, pq.ParquetFile] = {}
        if self._local:
            self._fs: fs.FileSystem = fs.LocalFileSystem()
            self._root = str(storage.local_path(url).absolute())
        else:
            scheme, _, host = os.environ["AWS_ENDPOINT_URL"].rpartition("://")
            self._fs = fs.S3FileSystem(
                endpoint_override=host,
                scheme=scheme,
                access_key=os.environ["AWS_ACCESS_KEY_ID"],
                secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
                region="us-east-1",
            )
            self._root = url.removeprefix("s3://")

    def read(self, path: str, row_group: int) -> int:
        """Read a row group, and return its number of rows."""
        if path not in self._files:
            source = self._fs.open_input_file(str(PurePosixPath(self._root) / path))
            self._files[path] = pq.ParquetFile(source, pre_buffer=not self._local)
        names, threads = INTERACTION_SCHEMA.names, self._use_threads
        table = self._files[path].read_row_group(row_group, columns=names, use_threads=threads)
        return int(table.num_rows)


if __name__ == "__main__":
    main()
