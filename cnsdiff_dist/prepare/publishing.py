"""Write a dataset directory: Parquet shards, raw arrays, and publishing them all at once."""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import MANIFEST
from cnsdiff_dist.data.schema import SPLITS, Blob, Shard, Split, leading_bytes
from cnsdiff_dist.errors import UserError

ROW_GROUP = 65_536
SHARD_ROWS = 128 * ROW_GROUP
_PARTS = (*SPLITS, "ids", "graph", "truth")
_STAGING = ".staging-"
_PUBLISHING = f"{_STAGING}publishing"  # there while OUT is written: what it holds is ours


def write_split(root: Path, folder: str, rows: pa.RecordBatchReader) -> Split:
    """Write a stream of rows as ``folder/part-NNNNN.parquet`` under ``root``.

    Row groups have 65,536 rows, but the last of a shard; so a reader can fetch blocks of rows.
    """
    shards: list[Shard] = []
    groups = _regrouped(rows)
    group = next(groups, None)
    while group is not None:
        path = f"{folder}/part-{len(shards):05d}.parquet"
        (root / folder).mkdir(parents=True, exist_ok=True)
        sizes: list[int] = []
        with pq.ParquetWriter(
            root / path, rows.schema, compression="zstd", write_page_checksum=True
        ) as writer:
            while group is not None and sum(sizes) < SHARD_ROWS:
                writer.write_table(group, row_group_size=ROW_GROUP)
                sizes.append(group.num_rows)
                group = next(groups, None)
        shards.append(
            Shard(
                **describe(root, path).model_dump(),
                **_checksums(root / path), rows=sum(sizes), row_groups=sizes,
            )
        )  # fmt: skip
    return Split(rows=sum(shard.rows for shard in shards), shards=shards)


def _checksums(path: Path) -> dict[str, Any]:
    """What :class:`Shard` has of the parts of a Parquet file, read back from it."""
    footer = pq.read_metadata(path)
    size = footer.serialized_size + 8  # its length and the magic follow it
    with path.open("rb") as file:

        def crc(start: int, stop: int) -> int:
            file.seek(start)
            return zlib.crc32(file.read(stop - start))

        end = file.seek(0, os.SEEK_END)
        groups = range(footer.num_row_groups)
        return {
            "row_group_crc32": [crc(*leading_bytes(footer, group)) for group in groups],
            "footer_bytes": size,
            "footer_crc32": crc(end - size, end),
        }


def _regrouped(rows: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """The same rows in tables of exactly ROW_GROUP rows, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    for batch in rows:
        waiting.append(batch)
        while sum(map(len, waiting)) >= ROW_GROUP:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, ROW_GROUP)
            waiting = table.slice(ROW_GROUP).to_batches()
    if sum(map(len, waiting)):
        yield pa.Table.from_batches(waiting)


def describe(root: Path, path: str) -> Blob:
    """The size and sha256 of a file under ``root``."""
    with (root / path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Blob(path=path, bytes=(root / path).stat().st_size, sha256=digest)


def check_output(out: str, overwrite: bool) -> None:
    """Find out before the work whether ``out`` can be written.

    Raises:
        UserError: ``out`` is a dataset, or holds anything, and may not be replaced; or it is
            remote and does not accept a file.
    """
    names = storage.list_files(out)
    if MANIFEST in names:
        if not overwrite:
            raise UserError(f"{storage.display(out)}: a dataset is here; --overwrite replaces it")
        _refuse_strangers(out)
    elif _PUBLISHING not in names and any(not name.startswith(_STAGING) for name in names):
        raise UserError(
            f"{storage.display(out)}: not empty, and not a dataset; choose another directory"
        )
    if not storage.is_local(out):
        probe = storage.join(out, f"{_STAGING}probe")
        storage.write_bytes(probe, b"-")
        storage.delete_tree(probe)


def _refuse_strangers(out: str) -> None:
    """Replacing a dataset deletes its folders: nothing of the user's may lie in them.

    The manifest may be of an older schema version, which "prepare again" is said to cure.
    """
    try:
        ours = set(_paths(json.loads(storage.read_text(storage.join(out, MANIFEST)))))
    except ValueError:  # not JSON
        ours = set()
    for name in storage.list_files(out):
        folder = name.partition("/")[0]
        if folder in _PARTS and folder != "truth" and name not in ours:
            raise UserError(
                f"{storage.display(out)}/{name}: not of the dataset there, which --overwrite "
                "would delete; move it away"
            )


def _paths(tree: Any) -> Iterator[str]:
    """Every ``path`` in a manifest."""
    if isinstance(tree, dict) and isinstance(tree.get("path"), str):
        yield tree["path"]
    elif isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _paths(branch)


@contextmanager
def staging(out: str) -> Iterator[Path]:
    """A local directory to build in, removed at the end whatever happens.

    For a local ``out`` it lies inside it, hence on the same disk; else it is where
    ``TMPDIR`` says.

    Raises:
        UserError: it cannot be made there.
    """
    target = storage.local_path(out) if storage.is_local(out) else None
    created = target is not None and not target.exists()
    with storage.explained(out if target else tempfile.gettempdir(), "write"):
        if target:
            target.mkdir(parents=True, exist_ok=True)
            for debris in target.glob(f"{_STAGING}*"):  # of a killed run
                shutil.rmtree(debris, ignore_errors=True)
        room = Path(tempfile.mkdtemp(prefix=_STAGING, dir=target))
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)
        if target and created:
            with suppress(OSError):
                target.rmdir()  # only if nothing was published


def publish(built: Path, out: str) -> None:
    """Move what was built to ``out``, ``manifest.json`` last; on failure ``out`` has none.

    What a killed one leaves is replaced by the next.

    Raises:
        UserError: ``out`` cannot be written.
    """
    storage.write_bytes(storage.join(out, _PUBLISHING), b"-")
    storage.delete_tree(storage.join(out, MANIFEST))
    for part in _PARTS:
        storage.delete_tree(storage.join(out, part))
    done = []
    try:
        for part in [*sorted(set(os.listdir(built)) - {MANIFEST}), MANIFEST]:
            done.append(part)
            _move(built / part, storage.join(out, part))
    except BaseException:
        for part in [*reversed(done), _PUBLISHING]:
            with suppress(UserError):
                storage.delete_tree(storage.join(out, part))
        raise
    storage.delete_tree(storage.join(out, _PUBLISHING))


def _move(source: Path, target: str) -> None:
    if storage.is_local(target):
        with storage.explained(target, "write"):
            os.replace(source, storage.local_path(target))
    elif source.is_file():
        storage.upload(source, target)
    else:
        for name in sorted(os.listdir(source)):
            _move(source / name, storage.join(target, name))
