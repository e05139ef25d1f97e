"""Writes the report of a suite into its output directory, and the report of a run into the run."""

import json

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.report_pages import run_page, suite_page
from cnsdiff_dist.comparison.result_tables import markdown, result_tables
from cnsdiff_dist.comparison.results import finished_runs, result_rows, write_rows
from cnsdiff_dist.comparison.scheduler import FAILURES
from cnsdiff_dist.comparison.significance import significance_stars
from cnsdiff_dist.comparison.suite import Suite
from cnsdiff_dist.errors import UserError

_PAGE = "report.html"


def write_suite_report(suite: Suite) -> str:
    """Write runs.parquet, table.md and report.html, and return the Markdown.

    Raises:
        UserError: no run is finished.
    """
    runs = finished_runs(suite)
    if not runs:
        raise UserError(f"{storage.display(suite.out)}: no finished run to report")
    write_rows(result_rows(runs), f"{suite.out}/runs.parquet")
    tables = result_tables(suite, runs, significance_stars(suite, runs))
    text = markdown(suite.name, tables)
    storage.write_text(f"{suite.out}/table.md", text)
    path = f"{suite.out}/{FAILURES}"
    failures = json.loads(storage.read_text(path)) if storage.exists(path) else {}
    storage.write_text(f"{suite.out}/{_PAGE}", suite_page(suite, runs, tables, failures))
    return text


def write_run_report(url: str) -> None:
    """Write RUN/report.html from what is in the run's directory."""
    storage.write_text(f"{url}/{_PAGE}", run_page(url))
