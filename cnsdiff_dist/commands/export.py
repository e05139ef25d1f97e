"""``cnsdiff export``: write the embeddings of a run, with raw ids."""

import argparse
from typing import TYPE_CHECKING

from cnsdiff_dist import storage
from cnsdiff_dist.commands.options import add_alpha, add_command, add_data, add_run

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers

_EPILOG = """\
example:
  cnsdiff export runs/demo out/embeddings
  python -c "import pyarrow.parquet as pq; print(pq.read_table('out/embeddings/items'))"
"""


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "export",
        run,
        help="write user and item embeddings as Parquet",
        description="Write the embeddings of a run's best checkpoint: URL/users/*.parquet and "
        "URL/items/*.parquet with columns id (raw) and embedding (float32 list). The score of a "
        "pair is the dot product; the environment adjustment is one more dimension. "
        "URL/_SUCCESS is written last.",
        epilog=_EPILOG,
    )
    add_run(parser)
    parser.add_argument("url", metavar="URL", help="directory to write, any fsspec URL")
    add_alpha(parser)
    add_data(parser)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist.inference.embeddings import write_embeddings
    from cnsdiff_dist.inference.trained_model import open_trained

    model, alpha = open_trained(args.run_url, args.data).with_alpha(args.alpha)
    write_embeddings(model, args.url, alpha)
    if model.run.world.is_main:
        manifest, dim = model.run.manifest, model.user_RD.shape[1]
        print(
            f"{manifest.users} user and {manifest.items} item embeddings of dimension {dim} "
            f"written to {storage.display(args.url)}, alpha {alpha:g}"
        )
