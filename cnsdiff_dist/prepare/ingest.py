"""Raw logs into one checked DuckDB table, ``raw``: the first stage of ``prepare``.

Every value is checked on the way in; the first bad one stops with its file and line.
"""

from collections.abc import Callable, Sequence

import duckdb
import numpy as np
import pyarrow as pa

from cnsdiff_dist import storage
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.log_formats import Log, LogFormat, open_log

Say = Callable[[str], None]
_SHOWN = 40  # characters of a bad value


def create_raw(db: duckdb.DuckDBPyConnection) -> None:
    """``split`` and ``file`` index the lists given to ``ingest``; ``line`` counts from 0."""
    db.execute(
        "CREATE TABLE raw (split UTINYINT, file INTEGER, line BIGINT, "
        '"user" VARCHAR, item VARCHAR, rating DOUBLE, "timestamp" BIGINT)'
    )


def ingest(
    db: duckdb.DuckDBPyConnection, files: Sequence[tuple[int, str]], how: LogFormat, say: Say
) -> list[Log]:
    """Append logs, given as (split, URL), to ``raw``; return them, consumed.

    Raises:
        UserError: a log cannot be read, or a value in it is not what its column needs.
    """
    logs = []
    for number, (split, url) in enumerate(files):
        with open_log(url, how) as log:
            rows = _ingest(db, split, number, log)
        say(f"read {storage.display(url)}: {rows:,} rows")
        logs.append(log)
    return logs


def place(log: Log, record: int) -> str:
    """Where a record, counted from 0, is for a person: ``FILE: line N``.

    Blank lines are no records, so a text file is scanned for the physical line.
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


def _ingest(db: duckdb.DuckDBPyConnection, split: int, number: int, log: Log) -> int:
    values = {role: _value(log, role) for role in log.schema.names}
    problem = "coalesce(" + ", ".join(_problem(log, role) for role in values) + ")"
    columns = ", ".join(f'{value} AS "{role}"' for role, value in values.items())
    names = ", ".join(f'"{role}"' for role in values)
    rows = 0
    for batch in log.batches:
        numbered = pa.Table.from_batches([batch]).append_column(
            "line", pa.array(np.arange(rows, rows + len(batch)))
        )
        db.register("batch", numbered)
        bad = db.execute(
            f"SELECT line, {problem} AS problem FROM batch WHERE problem IS NOT NULL "
            "ORDER BY line LIMIT 1"
        ).fetchall()
        for line, what in bad:
            raise UserError(f"{place(log, line)}: {what}")
        db.execute(
            f"INSERT INTO raw (split, file, line, {names}) "
            f"SELECT {split}, {number}, line, {columns} FROM batch"
        )
        db.unregister("batch")
        rows += len(batch)
    return rows


def _value(log: Log, role: str) -> str:
    """The SQL that turns a log's column into the type of ``raw``; NULL where it cannot."""
    kind = log.schema.field(role).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if role in ("user", "item"):
        if not (text or pa.types.is_integer(kind)):
            raise _wrong_type(log, role, kind, "integers or text")
        return f"nullif(trim(\"{role}\"), '')" if text else f'"{role}"::VARCHAR'
    if not (text or _numeric(kind) or (role == "timestamp" and pa.types.is_timestamp(kind))):
        raise _wrong_type(log, role, kind, "numbers")
    if role == "rating":
        return 'TRY_CAST("rating" AS DOUBLE)'
    if pa.types.is_timestamp(kind):
        return 'epoch_us("timestamp"::TIMESTAMP)'
    if pa.types.is_integer(kind):
        return 'TRY_CAST("timestamp" AS BIGINT)'
    # Not by way of DOUBLE, where nanoseconds since 1970 would lose their last digits.
    return 'TRY_CAST(floor(TRY_CAST("timestamp" AS DECIMAL(38, 6))) AS BIGINT)'


def _numeric(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(test(kind) for test in tests)


def _wrong_type(log: Log, role: str, kind: pa.DataType, wanted: str) -> UserError:
    return UserError(
        f"{storage.display(log.url)}: column {log.roles[role]} holds {kind}, but a {role} column "
        f"holds {wanted}; convert it, or name another with --{role}-column"
    )


def _problem(log: Log, role: str) -> str:
    """SQL that describes what is wrong with the column's value, NULL when it is fine."""
    column, value = log.roles[role].replace("'", "''"), _value(log, role)
    shown = f'left("{role}"::VARCHAR, {_SHOWN})'
    if role in ("user", "item"):
        return (
            f"CASE WHEN {value} IS NULL THEN 'column {column}: empty id; fill or drop the row' END"
        )
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
