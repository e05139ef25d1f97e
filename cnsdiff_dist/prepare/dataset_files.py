"""Write the files of a dataset from the database: splits, id maps, graph and manifest."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cnsdiff_dist.data.dataset import MANIFEST
from cnsdiff_dist.data.graph import index_dtype, write_csr
from cnsdiff_dist.data.schema import INTERACTION_SCHEMA, SPLITS, Blob, Graph, Manifest, Split
from cnsdiff_dist.prepare.database import Database, replace_table, scalar
from cnsdiff_dist.prepare.id_maps import SIDES
from cnsdiff_dist.prepare.recipe import Recipe
from cnsdiff_dist.prepare.shards import describe, write_split
from cnsdiff_dist.prepare.shifts import draw

_BATCH = 1 << 17


@dataclass(frozen=True)
class DatasetFiles:
    """What the manifest says about the files; the fields are those of ``Manifest``."""

    users: int
    items: int
    columns: list[str]
    splits: dict[str, Split]
    ids: dict[str, Split]
    graph: Graph
    environment_edges: list[int]


def write_files(db: Database, root: Path, environments: int, timed: bool) -> DatasetFiles:
    """Write everything but the manifest under ``root``.

    ``timed`` says whether the splits have timestamps.
    """
    columns = [*INTERACTION_SCHEMA.names, *(["timestamp"] if timed else [])]
    splits = {name: write_split(root, name, _split_rows(db, name, columns)) for name in SPLITS}
    counts = {table: _add_degrees(db, table, side) for table, side in SIDES.items()}
    histogram = db.execute(
        "SELECT degree, count(*) AS items FROM items GROUP BY ALL ORDER BY degree"
    ).fetchnumpy()
    edges = environment_edges(histogram["degree"], histogram["items"], environments)
    return DatasetFiles(
        users=counts["users"],
        items=counts["items"],
        columns=columns,
        splits={name: split for name, split in splits.items() if split.rows},
        ids={table: _write_ids(db, root, table, edges) for table in SIDES},
        graph=_write_graph(db, root, counts),
        environment_edges=edges,
    )


def environment_edges(
    degrees: npt.NDArray[np.int64], items: npt.NDArray[np.int64], environments: int
) -> list[int]:
    """Cut the items into up to ``environments`` popularity buckets of similar size.

    Args:
        degrees: the distinct train degrees of items, ascending.
        items: the number of items of each degree.

    Returns:
        The lowest degree of every bucket but the first, ascending. There are fewer buckets when
        many items share a degree; none is empty.
    """
    total = np.cumsum(items)
    ranks = np.ceil(np.arange(1, environments) / environments * (total[-1] - 1))
    edges = {int(degrees[index]) for index in np.searchsorted(total, ranks, side="right")}
    return sorted(edges - {int(degrees[0])})


def write_manifest(
    root: Path, recipe: Recipe, files: DatasetFiles, dropped: dict[str, int]
) -> Manifest:
    """Write the manifest of the dataset in ``root``; ``dropped`` counts rows by reason."""
    manifest = Manifest(
        schema_version=3,
        name=recipe.dataset_name,
        shift=recipe.shift_entry(),
        dropped=dropped,
        hashed_users=recipe.hashed_users,
        digest="",
        **vars(files),
    )
    # Defaults are left out, so that a field added later changes no digest of an old dataset.
    content = manifest.model_copy(update={"name": ""}).model_dump_json(exclude_defaults=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    manifest = manifest.model_copy(update={"digest": digest})
    (root / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def _split_rows(db: Database, name: str, columns: list[str]) -> pa.RecordBatchReader:
    # Train rows are shuffled, so that each block of them is a fair sample of the whole.
    order = '"user", item'
    if name == "train":
        order = f"{draw('order')}, {order}"
    selected = ", ".join(f'"{column}"::BIGINT AS "{column}"' for column in columns)
    split = SPLITS.index(name)
    return _batches(db, f"SELECT {selected} FROM rows WHERE split = {split} ORDER BY {order}")


def _batches(db: Database, query: str) -> pa.RecordBatchReader:
    return db.sql(query).to_arrow_reader(_BATCH)


def _add_degrees(db: Database, table: str, side: str) -> int:
    """Add the column ``degree``, the train rows of each id, to an id table; return its length."""
    with_degree = (
        f"SELECT {table}.*, degree FROM {table} JOIN "
        f'(SELECT "{side}" AS row, count(*) AS degree FROM rows WHERE split = 0 GROUP BY ALL) '
        "USING (row)"
    )
    replace_table(db, table, with_degree)
    return scalar(db, f"SELECT count(*) FROM {table}")


def _write_ids(db: Database, root: Path, table: str, edges: list[int]) -> Split:
    columns = "id, row::BIGINT AS row, degree::BIGINT AS degree"
    if table == "items":
        bucket = " + ".join(["0", *(f"(degree >= {edge})::BIGINT" for edge in edges)])
        columns += f", ({bucket})::BIGINT AS environment"
    return write_split(
        root, f"ids/{table}", _batches(db, f"SELECT {columns} FROM {table} ORDER BY row")
    )


def _write_graph(db: Database, root: Path, counts: dict[str, int]) -> Graph:
    (root / "graph").mkdir()
    dtype = index_dtype(counts["users"], counts["items"])
    blobs: dict[str, tuple[Blob, ...]] = {}
    for side, other in (("user", "item"), ("item", "user")):
        degrees = _column(db, f"SELECT degree FROM {side}s ORDER BY row")
        neighbours = _column(
            db, f'SELECT "{other}" FROM rows WHERE split = 0 ORDER BY "{side}", "{other}"'
        )
        # A connection reads one query at a time: write_csr uses up the degrees first.
        paths = write_csr(root, side, other, degrees, neighbours, dtype)
        for name, files in zip((f"{side}_indptr", f"{side}_{other}s"), paths, strict=True):
            blobs[name] = tuple(describe(root, path) for path in files)
    edges = scalar(db, "SELECT count(*) FROM rows WHERE split = 0")
    return Graph(edges=edges, index_dtype=dtype, **blobs)


def _column(db: Database, query: str) -> Iterator[npt.NDArray[np.int64]]:
    for batch in _batches(db, query):
        yield batch.column(0).to_numpy()
