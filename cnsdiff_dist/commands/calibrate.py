"""``cnsdiff calibrate``: fit how much popularity counts at scoring."""

import argparse
from typing import TYPE_CHECKING

from cnsdiff_dist import storage
from cnsdiff_dist.commands.options import add_command, add_data, add_run
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers

_EPILOG = """\
examples:
  cnsdiff calibrate runs/demo --split valid_ood
  cnsdiff calibrate runs/demo --exposure s3://bucket/last-week.parquet
Then evaluate, export and recommend use it; --alpha none leaves it out.
"""


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "calibrate",
        run,
        help="fit how much popularity counts at scoring",
        description="Score s(u, i) + alpha log p(i): fit alpha on a validation split, in seconds "
        "and without training, and write RUN/calibration.json.",
        epilog=_EPILOG,
    )
    add_run(parser)
    parser.add_argument("--split", help="validation split; default: the one that selects")
    parser.add_argument("--metric", help="default: the one that selects")
    parser.add_argument(
        "--exposure",
        metavar="FILE",
        help="Parquet or CSV of item (raw id) and weight; default: train degrees",
    )
    parser.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        metavar="A",
        default=[-0.5, 0.0, 0.5, 1.0, 1.5],
        help="where the search begins; default: %(default)s",
    )
    add_data(parser)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist.inference.trained_model import calibrate, open_trained

    if args.split and not args.split.startswith("valid"):
        raise UserError(f"--split {args.split}: calibrate on a validation split, never on a test")
    if args.exposure:
        storage.refuse_secrets(args.exposure)
    model = open_trained(args.run_url, args.data)
    calibration = calibrate(model, args.split, args.metric, args.exposure, args.alphas)
    if model.run.world.is_main:
        for point in calibration.curve:
            value = point["metrics"][calibration.metric]
            mark = "  (best)" if point["alpha"] == calibration.alpha else ""
            print(f"alpha {point['alpha']:7.3f}  {calibration.metric} {value:.4f}{mark}")
        where = storage.display(args.run_url)
        print(f"fitted on {calibration.split}; written to {where}/calibration.json")
