"""``cnsdiff report``: the tables and the page of a suite, or the page of a run."""

import argparse
from typing import TYPE_CHECKING

from cnsdiff_dist import storage
from cnsdiff_dist.commands.options import add_command, add_data

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers

_EPILOG = """\
examples:
  cnsdiff report runs/smoke        # a suite's output: runs.parquet, table.md, report.html
  cnsdiff report runs/demo         # one run: report.html
"""


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "report",
        run,
        help="write the report of a run or a comparison",
        description="Write the report of a comparison, from what is finished of it; or diagnose "
        "one run's best checkpoint (what its negatives are, the health of its generator, how much "
        "of the score is popularity) and write RUN/report.html, one file that needs no network.",
        epilog=_EPILOG,
    )
    parser.add_argument("url", metavar="RUN_OR_OUT", help="run directory, or a suite's output")
    add_data(parser, help="a run's dataset, if it has moved")


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist.comparison.report_files import write_run_report, write_suite_report
    from cnsdiff_dist.comparison.single_run import analyse_run
    from cnsdiff_dist.comparison.suite import load_suite
    from cnsdiff_dist.distributed.world import join_world

    if storage.exists(f"{args.url}/suite.yaml"):
        write_suite_report(load_suite(f"{args.url}/suite.yaml", args.url))
        print(f"written to {storage.display(args.url)}")
        return
    analyse_run(args.url, args.data)
    if join_world(60).is_main:
        write_run_report(args.url)
        print(f"written to {storage.display(args.url)}/report.html")
