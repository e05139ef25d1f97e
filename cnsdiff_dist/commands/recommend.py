"""``cnsdiff recommend``: the top-K items of users."""

import argparse

_EPILOG = """\
examples:
  cnsdiff recommend runs/demo out/top20 --k 20
  cnsdiff recommend runs/demo out/some --k 5 --users users.txt
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "recommend",
        help="write the top-K items of all or some users as Parquet",
        description="Rank every item for the users and write URL/*.parquet with columns user, "
        "item (raw ids), score and rank (1 is best). Train items are not recommended, but to users "
        "who share a row. URL/_SUCCESS is written last.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_url", metavar="RUN", help="run directory")
    parser.add_argument("url", metavar="URL", help="directory to write, any fsspec URL")
    parser.add_argument("--k", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--users",
        metavar="FILE",
        help="raw user ids, one a line; rare and later users too, if they may share rows. "
        "Default: all rows of the user table",
    )
    parser.add_argument(
        "--alpha", default="auto",
        help="environment adjustment: auto (the run's calibration, else what training selected), "
        "none or a number",
    )  # fmt: skip
    parser.add_argument(
        "--approximate", type=float, metavar="RECALL",
        help="by an index that is tuned to find this share of the exact lists' items, such as "
        "0.95: for millions of items; needs faiss-cpu",
    )  # fmt: skip
    parser.add_argument("--data", metavar="URL", help="the dataset, if it has moved")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist import storage
    from cnsdiff_dist.errors import UserError
    from cnsdiff_dist.inference.faiss_search import import_faiss
    from cnsdiff_dist.inference.parquet_output import listed_users, write_recommendations
    from cnsdiff_dist.inference.trained_model import open_trained

    if args.k < 1:
        raise UserError(f"--k {args.k}: lists have at least 1 item")
    if args.approximate is not None:
        if not 0 < args.approximate <= 1:
            raise UserError(f"--approximate {args.approximate}: more than 0, at most 1")
        import_faiss()  # or fail before the model is loaded
    model, alpha = open_trained(args.run_url, args.data).with_alpha(args.alpha)
    listed = listed_users(model, args.users) if args.users is not None else None
    record = write_recommendations(model, args.url, listed, args.k, alpha, args.approximate)
    if model.world.is_main:
        where = storage.display(args.url)
        shared = f" ({listed.hashed} by shared rows)" if listed and listed.hashed else ""
        print(
            f"{record['rows']} recommendations for {record['users']} users{shared} in {where}, "
            f"alpha {alpha:g}{_recall(record, model.world.size)}"
        )


def _recall(record: dict[str, float], ranks: int) -> str:
    if "recall" not in record:
        return ""
    exact = record["scores_all"]
    where = f" on {exact:.0f} of {ranks} ranks" if exact < ranks else ""
    note = f" (an index would not pay{where}: all were scored)" if exact else ""
    return f", recall of the exact lists {record['recall']:.3f}{note}"
