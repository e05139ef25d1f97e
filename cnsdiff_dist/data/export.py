"""From the database of ``prepare`` to files: id maps, splits, environments, graph."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cnsdiff_dist.data import writer
from cnsdiff_dist.data.graph import index_dtype, write_csr
from cnsdiff_dist.data.schema import INTERACTION_SCHEMA, SPLITS, Graph, Split
from cnsdiff_dist.data.shifts import draw

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


def number_ids(db: duckdb.DuckDBPyConnection) -> None:
    """Number users and items again, now only those in train: their rows in the tables."""
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


def write_parts(
    db: duckdb.DuckDBPyConnection, built: Path, environments: int, timed: bool
) -> Parts:
    """Write everything but the manifest under ``built``."""
    columns = [*INTERACTION_SCHEMA.names, *(["timestamp"] if timed else [])]
    splits = {
        name: writer.write_split(built, name, _split_rows(db, name, columns)) for name in SPLITS
    }
    degree = {side: _degrees(db, table, side) for table, side in _SIDES.items()}
    edges = environment_edges(degree["item"], environments)
    return Parts(
        users=len(degree["user"]),
        items=len(degree["item"]),
        columns=columns,
        splits={name: split for name, split in splits.items() if split.rows},
        ids={table: _write_ids(db, built, table, edges) for table in _SIDES},
        graph=_write_graph(db, built, degree),
        environment_edges=edges,
    )


def environment_edges(degree: npt.NDArray[np.int64], environments: int) -> list[int]:
    """Ascending degrees that cut the items into up to ``environments`` buckets of like size.

    Fewer when many items share a degree: no bucket is empty.
    """
    at = np.arange(1, environments) / environments
    cuts = {int(cut) for cut in np.quantile(degree, at, method="higher")}
    return sorted(cuts - {int(degree.min())})


def _split_rows(
    db: duckdb.DuckDBPyConnection, name: str, columns: list[str]
) -> pa.RecordBatchReader:
    # Train rows are shuffled, so that each block of them is a fair sample of the whole.
    order = '"user", item'
    if name == "train":
        order = f"{draw('order')}, {order}"
    listed = ", ".join(f'"{column}"::BIGINT AS "{column}"' for column in columns)
    return _query(
        db,
        f"SELECT {listed} FROM rows WHERE split = {SPLITS.index(name)} ORDER BY {order}",
    )


def _query(db: duckdb.DuckDBPyConnection, sql: str) -> pa.RecordBatchReader:
    return db.sql(sql).to_arrow_reader(_BATCH)


def _degrees(db: duckdb.DuckDBPyConnection, table: str, side: str) -> npt.NDArray[np.int64]:
    """Train interactions per row, kept in a ``degree`` column of the id table too."""
    db.execute(
        f"CREATE TABLE with_degree AS SELECT {table}.*, degree FROM {table} JOIN "
        f'(SELECT "{side}" AS row, count(*) AS degree FROM rows WHERE split = 0 GROUP BY ALL) '
        "USING (row)"
    )
    db.execute(f"DROP TABLE {table}; ALTER TABLE with_degree RENAME TO {table}")
    found = db.execute(f"SELECT degree FROM {table} ORDER BY row").fetchnumpy()["degree"]
    return np.asarray(found, np.int64)


def _write_ids(db: duckdb.DuckDBPyConnection, built: Path, table: str, edges: list[int]) -> Split:
    bucket = " + ".join(["0", *(f"(degree >= {edge})::BIGINT" for edge in edges)])
    environment = f", ({bucket})::BIGINT AS environment" if table == "items" else ""
    rows = _query(
        db,
        f"SELECT id, row::BIGINT AS row, degree::BIGINT AS degree{environment} "
        f"FROM {table} ORDER BY row",
    )
    return writer.write_split(built, f"ids/{table}", rows)


def _write_graph(
    db: duckdb.DuckDBPyConnection, built: Path, degree: dict[str, npt.NDArray[np.int64]]
) -> Graph:
    folder = built / "graph"
    folder.mkdir()
    dtype = index_dtype(len(degree["user"]), len(degree["item"]))
    blobs = {}
    for side, other in (("user", "item"), ("item", "user")):
        indptr, indices = f"graph/{side}_indptr.bin", f"graph/{side}_{other}s.bin"
        chunks = _column(db, side, other)
        write_csr(built / indptr, built / indices, degree[side], chunks, dtype)
        for path in (indptr, indices):
            blobs[path[len("graph/") : -len(".bin")]] = writer.describe(built, path)
    return Graph(edges=int(degree["user"].sum()), index_dtype=dtype, **blobs)


def _column(
    db: duckdb.DuckDBPyConnection, side: str, other: str
) -> Iterator[npt.NDArray[np.int64]]:
    sql = f'SELECT "{other}" AS neighbour FROM rows WHERE split = 0 ORDER BY "{side}", "{other}"'
    for batch in _query(db, sql):
        yield batch.column(0).to_numpy()
