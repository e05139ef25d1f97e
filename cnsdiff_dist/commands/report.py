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
        description="Write the report of a comparison, from what is finished of it, or of one "
        "run. The page is one file and needs no network.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", metavar="RUN_OR_OUT", help="run directory, or a suite's output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist import storage
    from cnsdiff_dist.comparison.report import write_report
    from cnsdiff_dist.comparison.suite import load_suite

    suite = load_suite(f"{args.url}/suite.yaml", args.url)
    write_report(suite)
    print(f"written to {storage.display(args.url)}")
