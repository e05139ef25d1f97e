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
        "item (raw ids), score and rank (1 is best). Train items are not recommended. "
        "URL/_SUCCESS is written last.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_url", metavar="RUN", help="run directory")
    parser.add_argument("url", metavar="URL", help="directory to write, any fsspec URL")
    parser.add_argument("--k", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--users", metavar="FILE", help="raw user ids, one a line; default: all")
    parser.add_argument(
        "--alpha", default="auto",
        help="environment adjustment: auto (the run's calibration, else what training selected), "
        "none or a number",
    )  # fmt: skip
    parser.add_argument(
        "--approximate", type=float, metavar="RECALL",
        help="find this share of the exact lists' items, such as 0.95, by an index: for millions "
        "of items; needs faiss-cpu",
    )  # fmt: skip
    parser.add_argument("--data", metavar="URL", help="the dataset, if it has moved")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist import storage
    from cnsdiff_dist.approximate import import_faiss
    from cnsdiff_dist.errors import UserError
    from cnsdiff_dist.outputs import listed_users, make_search, write_recommendations
    from cnsdiff_dist.trained import open_trained

    if args.k < 1:
        raise UserError(f"--k {args.k}: lists have at least 1 item")
    if args.approximate is not None:
        if not 0 < args.approximate <= 1:
            raise UserError(f"--approximate {args.approximate}: a share of 1, such as 0.95")
        import_faiss()  # or fail before the model is loaded
    model, alpha = open_trained(args.run_url, args.data).with_alpha(args.alpha)
    listed = listed_users(model, args.users) if args.users else None
    search, record = make_search(model, args.k, args.approximate)
    rows = write_recommendations(model, args.url, listed, search, record)
    if model.world.is_main:
        where = storage.display(args.url)
        how = f", recall of the exact lists {record['recall']:.3f}" if "recall" in record else ""
        users = len(listed.rows) if listed else model.manifest.users
        shared = f" ({listed.hashed} by shared rows)" if listed and listed.hashed else ""
        print(f"{rows} recommendations for {users} users{shared} in {where}, alpha {alpha:g}{how}")
