"""``cnsdiff recommend``: write the top-K items of users."""

import argparse
from typing import TYPE_CHECKING

from cnsdiff_dist import storage
from cnsdiff_dist.commands.options import add_alpha, add_command, add_data, add_run
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers

_EPILOG = """\
examples:
  cnsdiff recommend runs/demo out/top20 --k 20
  cnsdiff recommend runs/demo out/some --k 5 --users users.txt
"""


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "recommend",
        run,
        help="write the top-K items of all or some users as Parquet",
        description="Rank every item for the users and write URL/*.parquet with columns user, "
        "item (raw ids), score and rank (1 is best). Train items are not recommended, but to users "
        "who share a row. URL/_SUCCESS is written last.",
        epilog=_EPILOG,
    )
    add_run(parser)
    parser.add_argument("url", metavar="URL", help="directory to write, any fsspec URL")
    parser.add_argument("--k", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--users",
        metavar="FILE",
        help="raw user ids, one a line; rare and later users too, if they may share rows. "
        "Default: all rows of the user table",
    )
    add_alpha(parser)
    parser.add_argument(
        "--approximate",
        type=float,
        metavar="RECALL",
        help="by an index that is tuned to find this share of the exact lists' items, such as "
        "0.95: for millions of items; needs faiss-cpu",
    )
    add_data(parser)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist.inference.faiss_search import import_faiss
    from cnsdiff_dist.inference.listed_users import listed_users
    from cnsdiff_dist.inference.recommendations import write_recommendations
    from cnsdiff_dist.inference.trained_model import open_trained

    if args.k < 1:
        raise UserError(f"--k {args.k}: lists have at least 1 item")
    if args.approximate is not None:
        if not 0 < args.approximate <= 1:
            raise UserError(f"--approximate {args.approximate}: more than 0, at most 1")
        import_faiss()  # or fail before the model is loaded
    model, alpha = open_trained(args.run_url, args.data).with_alpha(args.alpha)
    listed = listed_users(model.run, args.users) if args.users is not None else None
    record = write_recommendations(model, args.url, listed, args.k, alpha, args.approximate)
    if model.run.world.is_main:
        where = storage.display(args.url)
        shared = f" ({listed.hashed} by shared rows)" if listed and listed.hashed else ""
        print(
            f"{record['rows']} recommendations for {record['users']} users{shared} in {where}, "
            f"alpha {alpha:g}{_recall(record, model.run.world.size)}"
        )


def _recall(record: dict[str, float], ranks: int) -> str:
    """How much of the exact lists an index found; empty if the lists are exact."""
    if "recall" not in record:
        return ""
    exact = record["scores_all"]
    where = f" on {exact:.0f} of {ranks} ranks" if exact < ranks else ""
    note = f" (an index would not pay{where}: all were scored)" if exact else ""
    return f", recall of the exact lists {record['recall']:.3f}{note}"
