"""Run `cnsdiff prepare` in this process, and read what it makes."""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist.commands.prepare import register
from cnsdiff_dist.data.dataset import load_manifest, read_ids, read_split
from cnsdiff_dist.data.schema import Manifest

Pairs = list[tuple[object, object]]
NOTHING_CUT = ["--valid-fraction", "0", "--valid-ood-fraction", "0"]


def prepare(*words: object) -> Manifest:
    """Run `cnsdiff prepare WORDS` and return the manifest; a UserError passes."""
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    args = parser.parse_args(["prepare", *map(str, words)])
    args.run(args)
    return load_manifest(args.out)


def raw_pairs(out: Path | str, manifest: Manifest, split: str) -> Pairs:
    """The (user, item) pairs of a split with raw ids, in stored order."""
    if split not in manifest.splits:
        return []
    ids = [read_ids(str(out), manifest, side)["id"].to_pylist() for side in ("users", "items")]
    users, items = read_split(str(out), manifest, split)
    return [(ids[0][user], ids[1][item]) for user, item in zip(users, items)]


def all_files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def write_parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def skewed_log(rows: int = 3000, users: int = 120, items: int = 80, seed: int = 0) -> pa.Table:
    """A log of distinct pairs, with items by a power law and timestamps that grow with the row."""
    rng = np.random.default_rng(seed)
    item = (items * rng.random(4 * rows) ** 3).astype(int)
    pairs = np.unique(rng.integers(0, users, 4 * rows) * items + item)
    pairs = rng.permutation(pairs)[:rows]
    return pa.table(
        {
            "user": pairs // items,
            "item": pairs % items,
            "rating": rng.integers(1, 6, len(pairs)),
            "timestamp": 1_000_000 + np.arange(len(pairs)),
        }
    )
