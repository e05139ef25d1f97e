"""Open a raw interaction log of any supported format as batches of named columns.

Text formats yield strings, Parquet its own types; what the values mean is checked by
``ingest``. A file is streamed through fsspec, so it may be remote, compressed (.gz, .bz2,
.xz, .zst) and larger than memory.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.errors import UserError

FORMATS = ("auto", "parquet", "csv", "tsv", "inter", "triples")
ROLES = ("user", "item", "rating", "timestamp")
_REQUIRED = ("user", "item")
_EXTENSIONS = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".inter": "inter",
}  # fmt: skip
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
_DELIMITERS = {"csv": ",", "tsv": "\t", "inter": "\t", "triples": " "}
_GUESSES = {
    "user": ("user", "user_id", "userid", "user_procid", "uid", "u", "reviewerid", "visitorid"),
    "item": ("item", "item_id", "itemid", "item_procid", "iid", "i", "movie_id", "movieid",
             "product_id", "productid", "asin", "business_id"),
    "rating": ("rating", "ratings", "score", "stars", "overall", "label"),
    "timestamp": ("timestamp", "time", "ts", "unixreviewtime"),
}  # fmt: skip
_RAGGED = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_BATCH_ROWS = 1 << 18
_BLOCK_BYTES = 1 << 22
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class LogFormat:
    """How to read a log; None and () mean: find out.

    ``columns`` names the columns of a file without a header; ``user`` .. ``timestamp`` say
    which column plays which role.
    """

    format: str = "auto"
    columns: tuple[str, ...] = ()
    user: str | None = None
    item: str | None = None
    rating: str | None = None
    timestamp: str | None = None


@dataclass(frozen=True)
class Log:
    """An open log. ``roles`` maps a role to its column; ``batches`` are named by role.

    ``unit`` and ``first`` say how a person numbers its records: line 2 is the first record
    of a text file with a header, row 1 that of a Parquet file.
    """

    url: str
    unit: str
    first: int
    roles: dict[str, str]
    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]


@contextmanager
def open_log(url: str, how: LogFormat) -> Iterator[Log]:
    """Open a log for one pass over it.

    Raises:
        UserError: missing, unreadable, empty or truncated file, or a wanted column is not
            in it. Raised by ``batches`` too, for damage further on.
    """
    head = _head(url)
    kind = _kind(url, how, head)
    compression = None if kind == "parquet" else "infer"
    with storage.open_read(url, compression) as file:
        with _one_line(url, kind):
            log = _open_parquet(url, file, how, kind) if kind == "parquet" else _open_text(
                url, file, how, kind, head
            )  # fmt: skip
        yield log


def _head(url: str) -> bytes:
    with storage.open_read(url, "infer") as file, storage.explained(url, "read"):
        try:
            head = bytes(file.read(_HEAD_BYTES))
        except EOFError:
            raise UserError(f"{storage.display(url)}: truncated compressed file") from None
    if not head.strip():
        raise UserError(f"{storage.display(url)}: empty file; give one with interactions")
    return head


def _kind(url: str, how: LogFormat, head: bytes) -> str:
    if how.format != "auto":
        return how.format
    path = PurePosixPath(storage.display(url))
    suffix = path.suffix.lower()
    if suffix in _COMPRESSIONS:
        suffix = PurePosixPath(path.stem).suffix.lower()
    if suffix in _EXTENSIONS:
        return _EXTENSIONS[suffix]
    if head.startswith(b"PAR1"):
        return "parquet"
    line = head.lstrip(b"\xef\xbb\xbf").splitlines()[0]
    if b"\t" in line:
        return "inter" if b":token" in line else "tsv"
    return "csv" if b"," in line else "triples"


def _open_parquet(url: str, file: IO[bytes], how: LogFormat, kind: str) -> Log:
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    roles = _roles(url, parquet.schema_arrow.names, how)
    if parquet.metadata.num_rows == 0:
        raise UserError(f"{storage.display(url)}: no rows; give a file with interactions")
    names = list(roles.values())
    schema = pa.schema([parquet.schema_arrow.field(name) for name in names])
    batches = parquet.iter_batches(_BATCH_ROWS, columns=names)
    return Log(url, "row", 1, roles, _renamed(schema, roles), _guarded(url, kind, batches, roles))


def _open_text(url: str, file: IO[bytes], how: LogFormat, kind: str, head: bytes) -> Log:
    delimiter = _DELIMITERS[kind]
    line = next(line for line in _text(url, head).splitlines() if line.strip())
    names, header = _names(how, kind, [word.strip(' "') for word in line.split(delimiter)])
    roles = _roles(url, names, how, headless=not header)
    reader = pacsv.open_csv(
        file,
        read_options=pacsv.ReadOptions(
            block_size=_BLOCK_BYTES, column_names=names, skip_rows=int(header), use_threads=False
        ),
        parse_options=pacsv.ParseOptions(delimiter=delimiter),
        convert_options=pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), include_columns=list(roles.values())
        ),
    )
    schema = _renamed(reader.schema, roles)
    return Log(url, "line", 1 + header, roles, schema, _guarded(url, kind, reader, roles))


def _text(url: str, head: bytes) -> str:
    try:
        # The head may end inside a character; only what comes before its last line end counts.
        return (head if len(head) < _HEAD_BYTES else head[: head.rfind(b"\n")]).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = head.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{storage.display(url)}: line {line}: not UTF-8 text; convert it, or give --format"
        ) from None


def _names(how: LogFormat, kind: str, first: list[str]) -> tuple[list[str], bool]:
    """The columns' names, and whether the file's first line holds them."""
    if how.columns:
        extra = [f"column {n + 1}" for n in range(len(how.columns), len(first))]
        return [*how.columns, *extra], False
    if kind == "triples":
        return [*ROLES[:3], *(f"column {n + 1}" for n in range(3, len(first)))][: len(first)], False
    return [name.split(":")[0] if kind == "inter" else name for name in first], True


def _roles(url: str, names: list[str], how: LogFormat, headless: bool = False) -> dict[str, str]:
    by_lower = {name.lower(): name for name in reversed(names)}
    found: dict[str, str] = {}
    for role in ROLES:
        asked = getattr(how, role)
        guesses = [by_lower[guess] for guess in _GUESSES[role] if guess in by_lower]
        if asked is not None and asked not in names:
            raise _no_column(url, f"no column {asked!r} (--{role}-column)", names, headless)
        if asked is None and not guesses:
            if role in _REQUIRED:
                raise _no_column(url, f"no {role} column", names, headless)
            continue
        found[role] = asked or guesses[0]
    return found


def _no_column(url: str, what: str, names: list[str], headless: bool) -> UserError:
    listed = ", ".join(names[:12]) + (", .." if len(names) > 12 else "")
    fix = "name them in --columns" if headless else (
        "pass --user-column and --item-column, or --columns if the file has no header"
    )  # fmt: skip
    return UserError(f"{storage.display(url)}: {what}; its columns are: {listed}; {fix}")


def _renamed(schema: pa.Schema, roles: dict[str, str]) -> pa.Schema:
    return pa.schema([(role, schema.field(name).type) for role, name in roles.items()])


def _guarded(
    url: str, kind: str, batches: Iterator[pa.RecordBatch], roles: dict[str, str]
) -> Iterator[pa.RecordBatch]:
    rows = 0
    with _one_line(url, kind):
        for batch in batches:
            rows += len(batch)
            yield batch.select(list(roles.values())).rename_columns(list(roles))
    if rows == 0:
        raise UserError(f"{storage.display(url)}: no rows; give a file with interactions")


@contextmanager
def _one_line(url: str, kind: str) -> Iterator[None]:
    """What pyarrow and the decompressors raise, as one line that names the file."""
    with storage.explained(url, "read"):
        try:
            yield
        except (pa.ArrowException, EOFError) as error:
            raise _damaged(url, kind, error) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise _damaged(url, kind, error) from None  # pyarrow's way to say: corrupt


def _damaged(url: str, kind: str, error: BaseException) -> UserError:
    where, reason = storage.display(url), " ".join(str(error).split())
    if ragged := _RAGGED.search(reason):
        line, wanted, found = ragged.groups()
        return UserError(
            f"{where}: line {line}: {found} columns, where {wanted} are expected; repair the line, "
            "or say how to read the file with --format"
        )
    return UserError(
        f"{where}: damaged, or not a {kind} file ({reason[:160]}); repair it, or say what it is "
        "with --format"
    )
