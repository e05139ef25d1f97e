"""Writes what a suite found into its output directory."""

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.results import finished_runs, rows, write_rows
from cnsdiff_dist.comparison.suite import Suite
from cnsdiff_dist.comparison.tables import markdown, tables_of
from cnsdiff_dist.errors import UserError


def write_report(suite: Suite) -> str:
    """Write runs.parquet and table.md.

    Returns:
        The Markdown.

    Raises:
        UserError: no run is finished.
    """
    runs = finished_runs(suite)
    if not runs:
        raise UserError(f"{storage.display(suite.out)}: no finished run to report")
    write_rows(rows(runs), f"{suite.out}/runs.parquet")
    text = markdown(suite.name, tables_of(suite, runs))
    storage.write_text(f"{suite.out}/table.md", text)
    return text
