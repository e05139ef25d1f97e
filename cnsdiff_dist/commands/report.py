"""``cnsdiff report``: the tables and the page of a suite, or the page of a run."""

import argparse

_EPILOG = """\
examples:
  cnsdiff report runs/smoke        # a suite's output: runs.parquet, table.md, report.html
  cnsdiff report runs/demo         # one run: report.html
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "report",
        help="write the report of a run or a comparison",
        description="Write the report of a comparison, from what is finished of it; or diagnose "
        "one run's best checkpoint (what its negatives are, the health of its generator, how much "
        "of the score is popularity) and write RUN/report.html, one file that needs no network.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", metavar="RUN_OR_OUT", help="run directory, or a suite's output")
    parser.add_argument("--data", metavar="URL", help="a run's dataset, if it has moved")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist import storage
    from cnsdiff_dist.comparison.report_files import write_report, write_run_report
    from cnsdiff_dist.comparison.single_run import study
    from cnsdiff_dist.comparison.suite import load_suite
    from cnsdiff_dist.distributed.world import join_world

    if storage.exists(f"{args.url}/suite.yaml"):
        write_report(load_suite(f"{args.url}/suite.yaml", args.url))
        print(f"written to {storage.display(args.url)}")
        return
    study(args.url, args.data)
    if join_world(60).is_main:
        write_run_report(args.url)
        print(f"written to {storage.display(args.url)}/report.html")
