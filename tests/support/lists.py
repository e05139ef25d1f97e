"""Read what `cnsdiff recommend` writes."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def read_lists(out: Path) -> dict[Any, list[tuple[Any, float]]]:
    """The (item, score) pairs of each user, best first."""
    found: dict[Any, list[tuple[Any, float]]] = {}
    for row in sorted(pq.read_table(out).to_pylist(), key=lambda row: row["rank"]):
        found.setdefault(row["user"], []).append((row["item"], row["score"]))
    return found
