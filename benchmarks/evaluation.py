"""Users a second of the full ranking against a bare matrix product and topk.

    python -m benchmarks.evaluation [--items 200000] [--users 2048]

One process, one thread. Both score every item for the same users, 256 at a time, and keep 20
items. Ours also masks each user's train items.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.machine import alternated, machine, ratio, report
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.evaluation.top_k import ExactSearch, top_k_lists

K, CHUNK = 20, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=2048)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--masked", type=int, default=15, help="train items of a user")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = alternated(_calls(args), args.rounds)
    report(
        {
            "benchmark": "evaluation",
            "machine": machine(),
            "users": args.users,
            "items": args.items,
            "dim": args.dim,
            "users_per_second": {n: round(args.users / min(v)) for n, v in seconds.items()},
            "share_of_bare": round(ratio(seconds, "bare", "ours"), 3),
        }
    )


def _calls(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    world = join_world(60)
    user, item = torch.randn(args.users, args.dim), torch.randn(args.items, args.dim)
    known = np.random.default_rng(0).integers(args.items, size=args.users * args.masked)
    owners = np.repeat(np.arange(args.users), args.masked)
    masks = [Interactions.from_pairs(owners, known, (args.users, args.items))]
    search = ExactSearch(item, range(args.items), masks, K)

    def ours() -> None:
        for _ in top_k_lists(user, np.arange(args.users), search, CHUNK, args.users, world):
            pass

    def bare() -> None:
        for start in range(0, args.users, CHUNK):
            torch.topk(user[start : start + CHUNK] @ item.t(), K, dim=1)

    return {"ours": ours, "bare": bare}


if __name__ == "__main__":
    main()
