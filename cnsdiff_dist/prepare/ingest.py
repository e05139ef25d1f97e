"""Read raw logs into one checked DuckDB table, ``raw``: the first stage of ``prepare``.

Every value is checked as it is read. The first bad value stops ``prepare`` with its file and line.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from cnsdiff_dist import storage
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.database import Database
from cnsdiff_dist.prepare.log_formats import Log, LogFormat, open_log

Say = Callable[[str], None]
_SHOWN = 40  # characters of a bad value


def ingest(
    db: Database, files: Sequence[tuple[int, str]], log_format: LogFormat, say: Say
) -> list[Log]:
    """Create ``raw`` from the logs ``files``, given as (split, URL).

    In ``raw``, ``file`` is an index into ``files`` and ``line`` counts a log's records from 0.

    Returns:
        The logs, whose batches are used up.

    Raises:
        UserError: a log cannot be read, or a value is not what its column needs.
    """
    db.execute(
        "CREATE TABLE raw (split UTINYINT, file INTEGER, line BIGINT, "
        '"user" VARCHAR, item VARCHAR, rating DOUBLE, "timestamp" BIGINT)'
    )
    logs = []
    for number, (split, url) in enumerate(files):
        with open_log(url, log_format) as log:
            rows = _append(db, split, number, log)
        say(f"read {storage.display(url)}: {rows:,} rows")
        logs.append(log)
    return logs


def location(log: Log, record: int) -> str:
    """Say where a record of a log is, as ``FILE: line N``; ``record`` counts from 0.

    The file is scanned for the line, because blank lines are not records.
    """
    if log.unit == "row":
        return f"{storage.display(log.url)}: row {record + 1}"
    wanted = record + log.first
    with storage.open_read(log.url, "infer") as file:
        for number, line in enumerate(file, 1):
            wanted -= bool(line.strip())
            if wanted == 0:
                return f"{storage.display(log.url)}: line {number}"
    return f"{storage.display(log.url)}: line {record + log.first}"


def _append(db: Database, split: int, number: int, log: Log) -> int:
    """Append a log to ``raw``; return its number of records."""
    values = {role: _value_sql(log, role) for role in log.schema.names}
    problem = "coalesce(" + ", ".join(_problem_sql(log, role) for role in values) + ")"
    columns = ", ".join(f'{value} AS "{role}"' for role, value in values.items())
    names = ", ".join(f'"{role}"' for role in values)
    rows = 0
    for batch in log.batches:
        lines = pa.array(np.arange(rows, rows + len(batch)))
        db.register("batch", pa.Table.from_batches([batch]).append_column("line", lines))
        _refuse_bad_values(db, log, problem)
        db.execute(
            f"INSERT INTO raw (split, file, line, {names}) "
            f"SELECT {split}, {number}, line, {columns} FROM batch"
        )
        db.unregister("batch")
        rows += len(batch)
    return rows


def _refuse_bad_values(db: Database, log: Log, problem: str) -> None:
    bad = db.execute(
        f"SELECT line, {problem} AS problem FROM batch WHERE problem IS NOT NULL "
        "ORDER BY line LIMIT 1"
    ).fetchall()
    for line, what in bad:
        raise UserError(f"{location(log, line)}: {what}")


def _value_sql(log: Log, role: str) -> str:
    """SQL that turns a log's column into its type in ``raw``, or NULL if that is impossible."""
    kind = log.schema.field(role).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if role in ("user", "item"):
        if not (text or pa.types.is_integer(kind)):
            raise _wrong_type(log, role, kind, "integers or text")
        return f"nullif(trim(\"{role}\"), '')" if text else f'"{role}"::VARCHAR'
    if not (text or _is_numeric(kind) or (role == "timestamp" and pa.types.is_timestamp(kind))):
        raise _wrong_type(log, role, kind, "numbers")
    if role == "rating":
        return 'TRY_CAST("rating" AS DOUBLE)'
    if pa.types.is_timestamp(kind):
        return 'epoch_us("timestamp"::TIMESTAMP)'
    if pa.types.is_integer(kind):
        return 'TRY_CAST("timestamp" AS BIGINT)'
    # DECIMAL, because nanoseconds since 1970 lose their last digits in a DOUBLE.
    return 'TRY_CAST(floor(TRY_CAST("timestamp" AS DECIMAL(38, 6))) AS BIGINT)'


def _is_numeric(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(test(kind) for test in tests)


def _wrong_type(log: Log, role: str, kind: pa.DataType, wanted: str) -> UserError:
    return UserError(
        f"{storage.display(log.url)}: column {log.roles[role]} holds {kind}, but a {role} column "
        f"holds {wanted}; convert it, or name another with --{role}-column"
    )


def _problem_sql(log: Log, role: str) -> str:
    """SQL that describes what is wrong with a value, or NULL if nothing is."""
    column, value = log.roles[role].replace("'", "''"), _value_sql(log, role)
    if role in ("user", "item"):
        return (
            f"CASE WHEN {value} IS NULL THEN 'column {column}: empty id; fill or drop the row' END"
        )
    shown = f'left("{role}"::VARCHAR, {_SHOWN})'
    wrong = f"concat('column {column}: ''', {shown}, ''' is not "
    fix = "; correct or drop the row')"
    if role == "timestamp":
        return (
            f"CASE WHEN {value} IS NULL THEN {wrong}a finite number (an integer time, such as "
            f"seconds since 1970){fix} END"
        )
    return (
        f"CASE WHEN {value} IS NULL OR NOT isfinite({value}) THEN {wrong}a finite number{fix} "
        f"WHEN {value} < 0 THEN {wrong}a rating of 0 or more{fix} END"
    )
