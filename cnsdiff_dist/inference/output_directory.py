"""A directory of Parquet files that every rank writes a part of, complete once it is committed.

``_INCOMPLETE`` is there from the beginning; ``_SUCCESS``, a line of JSON, is written last, and then
``_INCOMPLETE`` goes. A directory where a process was killed still has ``_INCOMPLETE``: the next
output replaces what lies there.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError

# Readers of a Parquet directory skip names with an underscore or a dot.
_DONE, _BEGUN = "_SUCCESS", "_INCOMPLETE"
_PART = re.compile(r"((users|items)/)?(part-\d{5}\.parquet|\.part-\d{5}\.parquet\.\w+)")
_MARK = re.compile(rf"{_DONE}|{_BEGUN}|\.({_DONE}|{_BEGUN})\.\w+")


def refuse_other_files(world: World, url: str) -> list[str]:
    """The files of an older output that lie there, on rank 0.

    Raises:
        UserError: there are other files, such as a dataset, whose names may look like ours.
    """
    found = storage.list_files(url) if world.is_main else []
    parts = [name for name in found if not _MARK.fullmatch(name)]
    ours = _BEGUN in found or (_DONE in found and _is_ours(url))
    foreign = [name for name in parts if not ours or not _PART.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{storage.display(url)}: holds other files ({foreign[0]}); choose an empty directory"
        )
    return found


def _is_ours(url: str) -> bool:
    try:
        return "step" in json.loads(storage.read_text(f"{url}/{_DONE}"))
    except (ValueError, TypeError):
        return False


def begin_output(world: World, url: str) -> None:
    """Mark the directory as incomplete and remove an older output, its ``_SUCCESS`` first.
    Collective.

    Raises:
        UserError: there are other files.
    """
    found = refuse_other_files(world, url)
    if world.is_main:
        storage.write_text(f"{url}/{_BEGUN}", "")
        for name in sorted(set(found) - {_BEGUN}, key=lambda name: name != _DONE):
            storage.delete_tree(f"{url}/{name}")
    world.barrier()


@contextmanager
def open_part(world: World, url: str) -> Iterator[Callable[[pa.Table], None]]:
    """This rank's file, written table by table. It appears whole at the end or, if it has no
    row, not at all."""
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None

        def write(table: pa.Table) -> None:
            nonlocal writer
            if writer is None and len(table):
                path = f"{url}/part-{world.rank:05d}.parquet"
                file = stack.enter_context(storage.open_write(path))
                writer = stack.enter_context(pq.ParquetWriter(file, table.schema))
            if writer is not None:
                writer.write_table(table)

        yield write


def commit_output(world: World, url: str, record: dict[str, float]) -> None:
    """Complete the directory: every rank has written its part, and ``_SUCCESS`` says what.
    Collective."""
    world.barrier()
    if world.is_main:
        storage.write_text(f"{url}/{_DONE}", json.dumps(record) + "\n")
        with suppress(UserError):  # a store may let nothing be deleted; _SUCCESS is what counts
            storage.delete_tree(f"{url}/{_BEGUN}")
    world.barrier()
