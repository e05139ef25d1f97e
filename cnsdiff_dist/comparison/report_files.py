"""Writes what a suite found into its output directory, and the page of a run into the run."""

import json

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.report_pages import run_page, stars_of, suite_page
from cnsdiff_dist.comparison.results import finished_runs, rows, write_rows
from cnsdiff_dist.comparison.scheduler import FAILURES
from cnsdiff_dist.comparison.suite import Suite
from cnsdiff_dist.comparison.tables import markdown, tables_of
from cnsdiff_dist.errors import UserError

PAGE = "report.html"


def write_report(suite: Suite) -> str:
    """Write runs.parquet, table.md and report.html.

    Returns:
        The Markdown.

    Raises:
        UserError: no run is finished.
    """
    runs = finished_runs(suite)
    if not runs:
        raise UserError(f"{storage.display(suite.out)}: no finished run to report")
    write_rows(rows(runs), f"{suite.out}/runs.parquet")
    tables = tables_of(suite, runs, stars_of(suite, runs))
    text = markdown(suite.name, tables)
    storage.write_text(f"{suite.out}/table.md", text)
    failures = f"{suite.out}/{FAILURES}"
    known = json.loads(storage.read_text(failures)) if storage.exists(failures) else {}
    storage.write_text(f"{suite.out}/{PAGE}", suite_page(suite, runs, tables, known))
    return text


def write_run_report(url: str) -> None:
    """Write RUN/report.html from what is in the run's directory."""
    storage.write_text(f"{url}/{PAGE}", run_page(url))
