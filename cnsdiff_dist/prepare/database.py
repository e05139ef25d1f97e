"""The DuckDB database in which ``prepare`` works.

The database lies on disk and spills its sorts and joins there, so memory bounds neither the log
nor the sorts. Its main table is ``rows``, one line per kept interaction:

- ``split``: an index into ``SPLITS``; 0 is train;
- ``user`` and ``item``: codes of ``id_maps.assign_codes``, later table rows of ``assign_rows``;
- ``timestamp``: as in the log, or NULL;
- ``file`` and ``line``: which record of which log it is, both counted from 0;
- ``key``: 64 random bits (see ``shifts.key``);
- ``kept``: true if no cut may move the line out of train.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from cnsdiff_dist import storage
from cnsdiff_dist.data.schema import SPLITS
from cnsdiff_dist.errors import UserError

Database = duckdb.DuckDBPyConnection


@contextmanager
def open_database(directory: Path, memory_limit: str, out: str) -> Iterator[Database]:
    """Open a new database in ``directory``; ``out`` is the URL that errors name.

    Raises:
        UserError: ``memory_limit`` is not a size, or memory or disk run out in the body.
    """
    db = None
    try:
        db = duckdb.connect(str(directory / "work.duckdb"))
        _configure(db, directory / "spill", memory_limit)
        yield db
    except duckdb.OutOfMemoryException:
        raise UserError(
            f"{storage.display(out)}: cannot sort the log with {memory_limit} of "
            "memory and the disk that is free there; raise --memory-limit or free some space"
        ) from None
    except duckdb.IOException as error:
        raise _io_error(out, error) from None
    except RuntimeError as error:
        if "interrupted" not in str(error):
            raise
        raise KeyboardInterrupt from None  # DuckDB turns Ctrl-C into a RuntimeError.
    finally:
        if db is not None:
            with suppress(duckdb.Error):  # Closing flushes, which fails on a full disk.
                db.close()


def _configure(db: Database, spill: Path, memory_limit: str) -> None:
    quoted = str(spill).replace("'", "''")
    db.execute(f"SET temp_directory='{quoted}'")
    try:
        db.execute("SET memory_limit=?", [memory_limit])
    except duckdb.Error:
        raise UserError(f"--memory-limit {memory_limit}: not a size; write it like 4GB") from None


def _io_error(out: str, error: duckdb.IOException) -> UserError:
    reason = " ".join(str(error).split())[:200]
    where = f"{storage.display(out)}: cannot write"
    if "No space left" in reason:
        return UserError(f"{where}: no space left; free some or write elsewhere")
    return UserError(f"{where}: {reason}")


def replace_table(db: Database, table: str, query: str) -> None:
    """Replace ``table`` by the result of ``query``, which may read the old table."""
    db.execute(f"CREATE TABLE replacement AS {query}")
    db.execute(f"DROP TABLE {table}; ALTER TABLE replacement RENAME TO {table}")


def scalar(db: Database, query: str) -> int:
    """Return the one integer that ``query`` selects."""
    ((value,),) = db.execute(query).fetchall()
    return int(value)


def count_rows(db: Database, split: str | None = None) -> int:
    """Count the lines of ``rows``, in one split or in all."""
    where = "" if split is None else f"WHERE split = {SPLITS.index(split)}"
    return scalar(db, f"SELECT count(*) FROM rows {where}")
