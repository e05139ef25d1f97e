"""Users a second of `recommend --approximate` against the exact search.

    python -m benchmarks.approximate [--items 1000000] [--recall 0.95]

One process, one thread. ``clustered`` items and users lie around 3,000 centres; ``noise`` has no
structure that an index could use, so every item is scored after all.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine, report
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.evaluation.top_k import ExactSearch
from cnsdiff_dist.inference.faiss_search import ApproximateSearch, recall_sums

K, CENTRES, MASKED, SAMPLE = 20, 3000, 15, 512


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
    torch.manual_seed(0)
    centre = between * torch.randn(CENTRES, args.dim)
    rows = args.items + args.users + SAMPLE
    vector = centre[torch.randint(CENTRES, (rows,))] + within * torch.randn(rows, args.dim)
    item, user = vector[: args.items], vector[args.items :]
    everyone = np.arange(len(user))
    known = np.random.default_rng(0).integers(args.items, size=len(user) * MASKED)
    shape = (len(user), args.items)
    masks = [Interactions.from_pairs(np.repeat(everyone, MASKED), known, shape)]
    exact = ExactSearch(torch.nn.functional.normalize(item, dim=1), range(args.items), masks, K)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Any, *words: Any) -> Any:
        started = time.perf_counter()
        result = function(*words)
        seconds[name] = time.perf_counter() - started
        return result

    def lists(name: str, search: Any, of: slice) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = timed(name, search, user[of], everyone[of])
        return result

    others = slice(SAMPLE, None)
    search: ApproximateSearch = timed("build", ApproximateSearch, exact, args.recall)
    lists("tune", search.tune, slice(SAMPLE))
    pair = [lists(name, s, others)[1] for name, s in (("ours", search), ("exact", exact))]
    hits, of = recall_sums(*(items.numpy() for items in pair))
    return {
        "index_seconds": round(seconds["build"] + seconds["tune"], 1),
        "users_per_second": {n: round(args.users / seconds[n]) for n in ("exact", "ours")},
        "times": round(seconds["exact"] / seconds["ours"], 1),
        "recall": round(hits / of, 3),
    }


if __name__ == "__main__":
    main()
