"""Whom top-K lists are written for: all users of a dataset, or those of a file.

Shapes: n listed users.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import read_id_blocks
from cnsdiff_dist.data.hashed_users import hashed_row
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.runs.opened import OpenRun

Ids = npt.NDArray[np.int64]
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")  # as it is written in a log


@dataclass(frozen=True)
class Listed:
    """Users, ordered by their row of the user table.

    Attributes:
        rows: int64 [n], ascending; users who share a row follow one another.
        names: raw ids [n].
        hashed: how many of them have no row of their own.
    """

    rows: Ids
    names: pa.Array
    hashed: int


def all_users(run: OpenRun) -> Listed:
    """The users that this rank owns."""
    own = run.world.own_rows(run.manifest.users)
    blocks = [ids for _, ids in read_id_blocks(run.data_url, run.manifest, "users", own)]
    names = pa.chunked_array(blocks, None if blocks else pa.string()).combine_chunks()
    return Listed(np.arange(own.start, own.stop), names, 0)


def listed_users(run: OpenRun, file: str) -> Listed:
    """The users of a text file with a raw id on each line.

    A user who is not in the dataset gets a shared row, if the dataset has such rows.

    Raises:
        UserError: a line is not a user of the dataset, and cannot get a shared row.
    """
    # Not splitlines: an id may have one of Unicode's other line ends.
    text = storage.read_text(file).removeprefix("\ufeff")
    lines = [line.strip() for line in text.split("\n")]
    wanted = list(dict.fromkeys(line for line in lines if line))
    if not wanted:
        raise UserError(f"{storage.display(file)}: no user ids in it")
    names = pa.array(wanted, pa.string())
    rows, kind = _known_rows(run, names)
    unknown = np.flatnonzero(rows < 0)
    for index in unknown:
        name = wanted[index]
        if problem := _no_shared_row(run, name, kind):
            where = f"{storage.display(file)} line {lines.index(name) + 1}"
            raise UserError(f"{where}: {name[:40]!r} is not a user of this dataset; {problem}")
        rows[index] = hashed_row(name, run.manifest)
    order = np.argsort(rows, kind="stable")
    return Listed(rows[order], names.take(pa.array(order)).cast(kind), len(unknown))


def _known_rows(run: OpenRun, names: pa.Array) -> tuple[Ids, pa.DataType]:
    """The table rows of raw ids, -1 of those that the dataset does not have, and the type that
    its ids have."""
    rows, kind = np.full(len(names), -1, np.int64), names.type
    everyone = range(run.manifest.users)
    for first, ids in read_id_blocks(run.data_url, run.manifest, "users", everyone):
        place, kind = pc.index_in(names, value_set=ids.cast(pa.string())), ids.type
        found = place.is_valid().to_numpy(zero_copy_only=False)
        rows[found] = first + place.drop_null().to_numpy()
    return rows, kind


def _no_shared_row(run: OpenRun, name: str, kind: pa.DataType) -> str | None:
    """Why an unknown user gets no shared row; None if it gets one."""
    if not run.manifest.hashed_users:
        return "`cnsdiff prepare --hashed-users` makes a dataset for those who come later"
    return "its ids are integers" if kind == pa.int64() and not _is_int64(name) else None


def _is_int64(name: str) -> bool:
    return bool(_INTEGER.fullmatch(name)) and -(2**63) <= int(name) < 2**63
