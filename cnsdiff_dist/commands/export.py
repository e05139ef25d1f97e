"""``cnsdiff export``: the embeddings of a run, with raw ids."""

import argparse

_EPILOG = """\
example:
  cnsdiff export runs/demo out/embeddings
  python -c "import pyarrow.parquet as pq; print(pq.read_table('out/embeddings/items'))"
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "export",
        help="write user and item embeddings as Parquet",
        description="Write the embeddings of a run's best checkpoint: URL/users/*.parquet and "
        "URL/items/*.parquet with columns id (raw) and embedding (float32 list). The score of a "
        "pair is the dot product; the environment adjustment is one more dimension. "
        "URL/_SUCCESS is written last.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_url", metavar="RUN", help="run directory")
    parser.add_argument("url", metavar="URL", help="directory to write, any fsspec URL")
    parser.add_argument(
        "--alpha", default="auto",
        help="environment adjustment: auto (the run's calibration, else what training selected), "
        "none or a number",
    )  # fmt: skip
    parser.add_argument("--data", metavar="URL", help="the dataset, if it has moved")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist import storage
    from cnsdiff_dist.inference.parquet_output import write_embeddings
    from cnsdiff_dist.inference.trained_model import open_trained

    model, alpha = open_trained(args.run_url, args.data).with_alpha(args.alpha)
    write_embeddings(model, args.url, alpha)
    if model.world.is_main:
        manifest, dim = model.manifest, model.user_RD.shape[1]
        print(
            f"{manifest.users} user and {manifest.items} item embeddings of dimension {dim} "
            f"written to {storage.display(args.url)}, alpha {alpha:g}"
        )
