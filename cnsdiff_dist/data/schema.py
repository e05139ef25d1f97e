"""The prepared dataset's contract: its columns and its manifest.

A dataset directory is described by ``manifest.json``, which is written last: a
directory without one is not a dataset. Everything else in this package trusts the
manifest for counts and checks files against it when it opens them.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cnsdiff_dist.errors import UserError

SPLITS = ("train", "valid_iid", "valid_ood", "test_iid", "test_ood")

INTERACTION_SCHEMA = pa.schema([("user", pa.int64()), ("item", pa.int64())])
"""Rows of the id maps, not raw ids. ``timestamp`` (int64, as in the log) may follow."""


# A manifest may mean harm: what it promises is what is allocated before a file is read.
Count = Annotated[int, Field(ge=0, lt=2**48)]
GroupRows = Annotated[int, Field(ge=0, le=2**20)]
RelativePath = Annotated[str, Field(max_length=500)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Strict):
    """One Parquet file of a split or id map; ``path`` is relative to the dataset directory.

    ``row_groups`` are their rows; ``row_group_crc32`` the zlib.crc32 of their
    :func:`leading_bytes`, which is what the train stream reads (in an id map they are there, but
    nothing reads by row group); ``footer_crc32`` that of the last ``footer_bytes``, to the end.
    """

    path: RelativePath
    rows: Count
    row_groups: list[GroupRows]
    row_group_crc32: list[int]
    footer_bytes: Count
    footer_crc32: int
    bytes: Count
    sha256: str

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.row_group_crc32) != len(self.row_groups):
            raise ValueError(f"{self.path}: row_group_crc32 and row_groups differ in length")
        if self.rows != sum(self.row_groups) or self.footer_bytes > self.bytes:
            raise ValueError(f"{self.path}: its rows or bytes are more or less than its parts")
        return self


def leading_bytes(footer: pq.FileMetaData, group: int) -> tuple[int, int]:
    """Where the first two columns of a row group, in a split user and item, lie in the file.

    [start, stop) from the first column chunk's first page to the second one's end, as stored;
    Parquet writes the chunks of a row group one after the other.
    """
    first, last = (footer.row_group(group).column(column) for column in (0, 1))
    return _first_page(first), _first_page(last) + last.total_compressed_size


def _first_page(chunk: pq.ColumnChunkMetaData) -> int:
    return int(chunk.dictionary_page_offset or chunk.data_page_offset)


class Split(_Strict):
    rows: Count
    shards: list[Shard]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rows != sum(shard.rows for shard in self.shards):
            raise ValueError(f"{self.rows} rows, which its shards have not")
        return self


class Blob(_Strict):
    """One raw file (graph arrays); ``path`` is relative to the dataset directory."""

    path: RelativePath
    bytes: Count
    sha256: str


Blobs = Annotated[tuple[Blob, ...], Field(min_length=1)]


class Graph(_Strict):
    """CSR of the train split in both directions; little-endian, indices sorted per row.

    ``indptr`` arrays are int64 [rows + 1]; index arrays have ``index_dtype`` [edges]. Each is
    cut into one or more files, whose bytes follow one another.
    """

    edges: Count
    index_dtype: Literal["int32", "int64"]
    user_indptr: Blobs
    user_items: Blobs
    item_indptr: Blobs
    item_users: Blobs

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return self.user_indptr + self.user_items + self.item_indptr + self.item_users


class Manifest(_Strict):
    """What is in a dataset directory.

    ``columns`` are those of the splits; ``shift`` says how they were made; ``environment_edges``
    are train degrees of items, ascending; ``dropped`` counts input rows by why they are in no
    split; ``hashed_users`` are the table rows that rare and unknown users share;
    ``digest`` is the sha256 of everything here but ``name``.
    """

    schema_version: Literal[3]
    name: str
    users: Count
    items: Count
    columns: list[str]
    shift: dict[str, str | int | float | None]
    splits: dict[str, Split]
    ids: dict[Literal["users", "items"], Split]
    graph: Graph
    environment_edges: list[int]
    dropped: dict[str, int]
    hashed_users: Count = 0
    digest: str

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if "train" not in self.splits or set(self.ids) != {"users", "items"}:
            raise ValueError("no train split, or no id map of users or items")
        if any(a > b for a, b in pairwise(self.environment_edges)):
            raise ValueError("environment_edges do not ascend")
        if self.hashed_users > self.users:
            raise ValueError("more hashed_users than users")
        return self

    @property
    def train(self) -> Split:
        return self.splits["train"]

    @property
    def environments(self) -> int:
        return len(self.environment_edges) + 1

    def environment_of(self, degree: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The popularity bucket of items with these train degrees: 0 is the least popular."""
        return np.searchsorted(np.asarray(self.environment_edges), degree, side="right")


def parse_manifest(text: str, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        UserError: the text is not a manifest of this schema version.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(root)"
        raise UserError(
            f"{where}: not a dataset manifest: {key}: {first['msg']}; run `cnsdiff prepare` again"
        ) from None
