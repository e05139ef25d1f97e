"""``cnsdiff compare``: several methods on several datasets, under one budget."""

import argparse
import os
from typing import TYPE_CHECKING

from cnsdiff_dist import storage
from cnsdiff_dist.commands.options import add_command
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers
    from cnsdiff_dist.comparison.suite import Job, Suite

_EPILOG = """\
examples:
  cnsdiff compare configs/suites/smoke.yaml --processes 2
  cnsdiff compare configs/suites/smoke.yaml --out runs/other

Every method tries the same number of trials on the first seed; the best by validation, never
by a test, is run on the other seeds. The same command again does what is left.
"""


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "compare",
        run,
        help="compare methods over datasets and seeds",
        description="Train and evaluate every run of a suite, several side by side, and write "
        "OUT/runs.parquet, OUT/table.md and OUT/report.html. A run that fails is recorded, and "
        "the others go on.",
        epilog=_EPILOG,
    )
    parser.add_argument("suite", metavar="SUITE", help="YAML file; see configs/suites/")
    parser.add_argument("--out", metavar="URL", help="default: the suite's, or runs/NAME")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="runs side by side; default: 1"
    )
    parser.set_defaults(cleans_up=True)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist.comparison.report_files import write_suite_report
    from cnsdiff_dist.comparison.scheduler import Scheduler, SuiteProgress
    from cnsdiff_dist.comparison.suite import load_suite

    if args.processes < 1:
        raise UserError(f"--processes {args.processes}: at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare starts its own processes; run it without torchrun")
    suite = load_suite(args.suite, args.out)
    _check_places(suite, args.suite)
    with SuiteProgress() as progress:
        scheduler = Scheduler(suite, progress)
        progress.begin(scheduler.total)
        scheduler.run(work, args.processes)
    print(write_suite_report(suite), end="")
    print(f"written to {storage.display(suite.out)}")
    if scheduler.failures:
        where, reason = next(iter(scheduler.failures.items()))
        raise UserError(f"{len(scheduler.failures)} runs failed, first {where}: {reason}")


def _check_places(suite: "Suite", path: str) -> None:
    """
    Raises:
        UserError: a URL holds a secret, or a dataset lacks the split that selects.
    """
    from cnsdiff_dist.data.dataset import load_manifest

    storage.refuse_secrets(suite.out)
    for name, entry in suite.datasets.items():
        storage.refuse_secrets(entry.url)
        splits = load_manifest(entry.url).splits
        if entry.select not in splits:
            raise UserError(
                f"{path}: datasets.{name}.select: {entry.select} is none of its splits "
                f"({', '.join(splits)})"
            )


def work(job: "Job") -> None:
    """Do one job; called in a worker process."""
    from cnsdiff_dist.commands.train import train
    from cnsdiff_dist.comparison.single_run import analyse_run, run_job

    if job.task == "diagnose":
        analyse_run(job.url, job.config.data.url)
    else:
        run_job(job, train)
