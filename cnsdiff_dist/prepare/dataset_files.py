"""From the database of ``prepare`` to files: id maps, splits, environments, graph."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cnsdiff_dist.data.graph import index_dtype, write_csr
from cnsdiff_dist.data.schema import INTERACTION_SCHEMA, SPLITS, Blob, Graph, Split
from cnsdiff_dist.prepare import publishing
from cnsdiff_dist.prepare.shifts import draw

_BATCH = 1 << 17
_SIDES = {"users": "user", "items": "item"}


@dataclass(frozen=True)
class Parts:
    """What the manifest says about the files; fields as there."""

    users: int
    items: int
    columns: list[str]
    splits: dict[str, Split]
    ids: dict[str, Split]
    graph: Graph
    environment_edges: list[int]


def code_ids(db: duckdb.DuckDBPyConnection) -> None:
    """``raw`` to ``coded``, with ids as numbers in the order of ``users`` and ``items``.

    Ids sort as numbers when all of them are integers, else as text (by UTF-8 bytes).
    """
    for table, side in _SIDES.items():
        ((numeric,),) = db.execute(
            f'SELECT bool_and(TRY_CAST("{side}" AS BIGINT)::VARCHAR IS NOT DISTINCT FROM "{side}") '
            "FROM raw"
        ).fetchall()
        kind = "BIGINT" if numeric else "VARCHAR"
        db.execute(
            f'CREATE TABLE {table}_sorted AS SELECT DISTINCT "{side}"::{kind} AS id '
            "FROM raw ORDER BY id"
        )
        db.execute(f"CREATE TABLE {table} AS SELECT id, rowid AS code FROM {table}_sorted")
        db.execute(f"DROP TABLE {table}_sorted")
    db.execute("""
        CREATE TABLE coded AS
        SELECT split, file, line, users.code AS "user", items.code AS item, rating, "timestamp"
        FROM raw JOIN users ON users.id::VARCHAR = "user" JOIN items ON items.id::VARCHAR = item
    """)
    db.execute("DROP TABLE raw")


def number_ids(db: duckdb.DuckDBPyConnection) -> int:
    """Number users and items again, now only those in train: their rows in the tables.

    Returns:
        the number of users.
    """
    for table, side in _SIDES.items():
        db.execute(
            f"CREATE TABLE {table}_sorted AS SELECT id, code FROM {table} "
            f'WHERE code IN (SELECT "{side}" FROM rows WHERE split = 0) ORDER BY code'
        )
        db.execute(
            f"DROP TABLE {table}; "
            f"CREATE TABLE {table} AS SELECT id, code, rowid AS row FROM {table}_sorted; "
            f"DROP TABLE {table}_sorted"
        )
    db.execute("""
        CREATE TABLE numbered AS SELECT rows.* REPLACE (users.row AS "user", items.row AS item)
        FROM rows JOIN users ON users.code = "user" JOIN items ON items.code = item
    """)
    db.execute("DROP TABLE rows; ALTER TABLE numbered RENAME TO rows")
    ((users,),) = db.execute("SELECT count(*) FROM users").fetchall()
    return int(users)


def write_parts(
    db: duckdb.DuckDBPyConnection, built: Path, environments: int, timed: bool
) -> Parts:
    """Write everything but the manifest under ``built``."""
    columns = [*INTERACTION_SCHEMA.names, *(["timestamp"] if timed else [])]
    splits = {
        name: publishing.write_split(built, name, _split_rows(db, name, columns)) for name in SPLITS
    }
    counts = {table: _add_degrees(db, table, side) for table, side in _SIDES.items()}
    histogram = db.execute(
        "SELECT degree, count(*) AS items FROM items GROUP BY ALL ORDER BY degree"
    ).fetchnumpy()
    edges = environment_edges(histogram["degree"], histogram["items"], environments)
    return Parts(
        users=counts["users"],
        items=counts["items"],
        columns=columns,
        splits={name: split for name, split in splits.items() if split.rows},
        ids={table: _write_ids(db, built, table, edges) for table in _SIDES},
        graph=_write_graph(db, built, counts),
        environment_edges=edges,
    )


def environment_edges(
    degree: npt.NDArray[np.int64], count: npt.NDArray[np.int64], environments: int
) -> list[int]:
    """Ascending degrees that cut the items into up to ``environments`` buckets of like size.

    ``count`` items have each ``degree``, ascending. Fewer buckets when many items share a
    degree: none is empty.
    """
    total = np.cumsum(count)
    at = np.ceil(np.arange(1, environments) / environments * (total[-1] - 1))
    cuts = {int(degree[place]) for place in np.searchsorted(total, at, side="right")}
    return sorted(cuts - {int(degree[0])})


def _split_rows(
    db: duckdb.DuckDBPyConnection, name: str, columns: list[str]
) -> pa.RecordBatchReader:
    # Train rows are shuffled, so that each block of them is a fair sample of the whole.
    order = '"user", item'
    if name == "train":
        order = f"{draw('order')}, {order}"
    listed = ", ".join(f'"{column}"::BIGINT AS "{column}"' for column in columns)
    return _query(
        db, f"SELECT {listed} FROM rows WHERE split = {SPLITS.index(name)} ORDER BY {order}"
    )


def _query(db: duckdb.DuckDBPyConnection, sql: str) -> pa.RecordBatchReader:
    return db.sql(sql).to_arrow_reader(_BATCH)


def _add_degrees(db: duckdb.DuckDBPyConnection, table: str, side: str) -> int:
    """A ``degree`` column for the id table: train interactions per row. Returns its rows."""
    db.execute(
        f"CREATE TABLE with_degree AS SELECT {table}.*, degree FROM {table} JOIN "
        f'(SELECT "{side}" AS row, count(*) AS degree FROM rows WHERE split = 0 GROUP BY ALL) '
        "USING (row)"
    )
    db.execute(f"DROP TABLE {table}; ALTER TABLE with_degree RENAME TO {table}")
    ((rows,),) = db.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(rows)


def _write_ids(db: duckdb.DuckDBPyConnection, built: Path, table: str, edges: list[int]) -> Split:
    bucket = " + ".join(["0", *(f"(degree >= {edge})::BIGINT" for edge in edges)])
    environment = f", ({bucket})::BIGINT AS environment" if table == "items" else ""
    rows = _query(
        db,
        f"SELECT id, row::BIGINT AS row, degree::BIGINT AS degree{environment} "
        f"FROM {table} ORDER BY row",
    )
    return publishing.write_split(built, f"ids/{table}", rows)


def _write_graph(db: duckdb.DuckDBPyConnection, built: Path, counts: dict[str, int]) -> Graph:
    (built / "graph").mkdir()
    dtype = index_dtype(counts["users"], counts["items"])
    blobs: dict[str, tuple[Blob, ...]] = {}
    for side, other in (("user", "item"), ("item", "user")):
        degrees = _column(db, f"SELECT degree FROM {side}s ORDER BY row")
        neighbours = _column(
            db, f'SELECT "{other}" FROM rows WHERE split = 0 ORDER BY "{side}", "{other}"'
        )
        # Two queries of one connection cannot be read in turns, nor need they be.
        paths = write_csr(built, side, other, degrees, neighbours, dtype)
        for name, files in zip((f"{side}_indptr", f"{side}_{other}s"), paths, strict=True):
            blobs[name] = tuple(publishing.describe(built, path) for path in files)
    ((edges,),) = db.execute("SELECT count(*) FROM rows WHERE split = 0").fetchall()
    return Graph(edges=edges, index_dtype=dtype, **blobs)


def _column(db: duckdb.DuckDBPyConnection, sql: str) -> Iterator[npt.NDArray[np.int64]]:
    for batch in _query(db, sql):
        yield batch.column(0).to_numpy()
