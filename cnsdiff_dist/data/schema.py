"""The format of a prepared dataset: its columns and its manifest.

``manifest.json`` describes a dataset directory. It is written last, so a directory without one is
not a dataset. Readers take counts from the manifest and check every file that they open against it.
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
"""Users and items are table rows, not raw ids. ``timestamp`` (int64, as in the log) may follow."""

# Counts are bounded, because memory is allocated by them before any file is read, and a manifest
# may be malicious.
Count = Annotated[int, Field(ge=0, lt=2**48)]
RowGroupRows = Annotated[int, Field(ge=0, le=2**20)]
RelativePath = Annotated[str, Field(max_length=500)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Strict):
    """One Parquet file of a split or of an id map.

    Attributes:
        path: relative to the dataset directory.
        row_groups: the number of rows of each row group.
        row_group_crc32: zlib.crc32 of the `leading_bytes` of each row group, which the train
            stream reads.
        footer_bytes: the length of the footer, from its start to the end of the file.
        footer_crc32: zlib.crc32 of the footer.
        sha256: of the whole file.
    """

    path: RelativePath
    rows: Count
    row_groups: list[RowGroupRows]
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


def leading_bytes(footer: pq.FileMetaData, row_group: int) -> tuple[int, int]:
    """Locate the first two columns of a row group, which are user and item in a split.

    Returns:
        The bytes [start, stop) of the file, from the first page of the first column chunk to the
        end of the second chunk. Parquet writes the chunks of a row group one after the other.
    """
    first, last = (footer.row_group(row_group).column(column) for column in (0, 1))
    return _first_page(first), _first_page(last) + last.total_compressed_size


def _first_page(chunk: pq.ColumnChunkMetaData) -> int:
    return int(chunk.dictionary_page_offset or chunk.data_page_offset)


class Split(_Strict):
    """The Parquet files of a split or of an id map, in order."""

    rows: Count
    shards: list[Shard]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rows != sum(shard.rows for shard in self.shards):
            raise ValueError(f"{self.rows} rows, which its shards have not")
        return self


class Blob(_Strict):
    """One file of a graph array, without a header; ``path`` is relative to the dataset."""

    path: RelativePath
    bytes: Count
    sha256: str


Blobs = Annotated[tuple[Blob, ...], Field(min_length=1)]


class Graph(_Strict):
    """The train graph in CSR from both sides; little-endian, with indices sorted in each row.

    The indptr arrays are int64 [U + 1] and [I + 1]; the index arrays are ``index_dtype`` [edges].
    An array lies in one or more files, whose bytes follow one another.
    """

    edges: Count
    index_dtype: Literal["int32", "int64"]
    user_indptr: Blobs
    user_items: Blobs
    item_indptr: Blobs
    item_users: Blobs

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """All files of the graph."""
        return self.user_indptr + self.user_items + self.item_indptr + self.item_users


class Manifest(_Strict):
    """What is in a dataset directory.

    Attributes:
        users, items: the number of table rows, U and I.
        columns: the columns of the splits.
        shift: how the splits were made.
        ids: the id maps.
        environment_edges: the lowest train degree of every popularity bucket of items but the
            first, ascending.
        dropped: the number of input rows in no split, by reason.
        hashed_users: the number of table rows, the last ones, that rare and unknown users share.
        digest: the sha256 of everything here but ``name``.
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
        """The number of popularity buckets of items."""
        return len(self.environment_edges) + 1

    def environment_of(self, degree: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the popularity bucket of each train degree of an item; 0 is the least popular."""
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
