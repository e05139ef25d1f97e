"""Users a second of `recommend --approximate` against the exact search.

    python -m benchmarks.approximate [--items 1000000] [--recall 0.95]

One process, one thread. ``clustered`` items and users lie around 3,000 centres. ``noise`` has no
structure that an index could use, so the search scores every item after all.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import machine, report
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.evaluation.top_k import ExactSearch
from cnsdiff_dist.inference.faiss_search import ApproximateSearch, recall_sums

K, CENTRES, MASKED_ITEMS, TUNING_USERS = 20, 3000, 15, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--recall", type=float, default=0.95)
    args = parser.parse_args()
    torch.set_num_threads(1)
    spreads = {"clustered": (1.0, 0.7), "noise": (0.0, 1.0)}
    found = {name: _measure(args, *spread) for name, spread in spreads.items()}
    settings = {name: getattr(args, name) for name in ("items", "users", "dim", "recall")}
    report({"benchmark": "approximate lists", "machine": machine(), **settings, **found})


def _measure(args: argparse.Namespace, between: float, within: float) -> dict[str, Any]:
    """Seconds and recall, for standard deviations between the centres and within a cluster."""
    torch.manual_seed(0)
    centre = between * torch.randn(CENTRES, args.dim)
    rows = args.items + args.users + TUNING_USERS
    vector = centre[torch.randint(CENTRES, (rows,))] + within * torch.randn(rows, args.dim)
    item, user = vector[: args.items], vector[args.items :]
    row = np.arange(len(user))
    masks = [_random_masks(row, args.items)]
    exact = ExactSearch(torch.nn.functional.normalize(item, dim=1), range(args.items), masks, K)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any], *words: Any) -> Any:
        started = time.perf_counter()
        result = function(*words)
        seconds[name] = time.perf_counter() - started
        return result

    search: ApproximateSearch = timed("build", ApproximateSearch, exact, args.recall)
    timed("tune", search.tune, user[:TUNING_USERS], row[:TUNING_USERS])
    others = user[TUNING_USERS:], row[TUNING_USERS:]
    found = timed("ours", search, *others)[1].numpy()
    wanted = timed("exact", exact, *others)[1].numpy()
    hits, of = recall_sums(found, wanted)
    return {
        "index_seconds": round(seconds["build"] + seconds["tune"], 1),
        "users_per_second": {n: round(args.users / seconds[n]) for n in ("exact", "ours")},
        "times": round(seconds["exact"] / seconds["ours"], 1),
        "recall": round(hits / of, 3),
    }


def _random_masks(row: npt.NDArray[np.int64], items: int) -> Interactions:
    known = np.random.default_rng(0).integers(items, size=len(row) * MASKED_ITEMS)
    return Interactions.from_pairs(np.repeat(row, MASKED_ITEMS), known, (len(row), items))


if __name__ == "__main__":
    main()
