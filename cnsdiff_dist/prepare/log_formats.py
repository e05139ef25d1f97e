"""Open a raw interaction log of any supported format as batches of named columns.

Text formats yield strings and Parquet yields its own types; ``ingest`` checks the values. A file
is streamed through fsspec, so it may be remote, compressed (.gz, .bz2, .xz, .zst) and larger than
memory.
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
_EXTENSIONS = {".pq": "parquet"} | {f".{name}": name for name in ("parquet", "csv", "tsv", "inter")}
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
_DELIMITERS = {"csv": ",", "tsv": "\t", "inter": "\t", "triples": " "}
# The column names, in lower case, that are taken for a role; the first one found wins.
_GUESSES = {
    "user": "user user_id userid user_procid uid u reviewerid visitorid",
    "item": (
        "item item_id itemid item_procid iid i movie_id movieid product_id productid asin "
        "business_id"
    ),
    "rating": "rating ratings score stars overall label",
    "timestamp": "timestamp time ts unixreviewtime",
}
_RAGGED = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_BATCH_ROWS = 1 << 18
_BLOCK_BYTES = 1 << 22
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class LogFormat:
    """How to read a log; None and () mean that it is found out.

    ``columns`` names the columns of a file without a header. ``user``, ``item``, ``rating`` and
    ``timestamp`` name the columns that play these roles.
    """

    format: str = "auto"
    columns: tuple[str, ...] = ()
    user: str | None = None
    item: str | None = None
    rating: str | None = None
    timestamp: str | None = None


@dataclass(frozen=True)
class Log:
    """An open log.

    Attributes:
        unit: what error messages call a record: ``line`` or, in Parquet, ``row``.
        first: the number of the first record in error messages: 2 if a header is line 1.
        roles: the name in the file of each role's column.
        schema: the type of each role's column.
        batches: the records; their columns are named by role.
    """

    url: str
    unit: str
    first: int
    roles: dict[str, str]
    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]


@contextmanager
def open_log(url: str, log_format: LogFormat) -> Iterator[Log]:
    """Open a log for one pass over it.

    Raises:
        UserError: the file is missing, unreadable, empty or truncated, or has no column for a
            role. ``Log.batches`` raises it too, for damage further on.
    """
    head = _head(url)
    kind = log_format.format
    if kind == "auto":
        kind = _detected_format(url, head)
    compression = None if kind == "parquet" else "infer"
    with storage.open_read(url, compression) as file:
        with _explained(url, kind):
            if kind == "parquet":
                log = _open_parquet(url, file, log_format, kind)
            else:
                log = _open_text(url, file, log_format, kind, head)
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


def _detected_format(url: str, head: bytes) -> str:
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


def _open_parquet(url: str, file: IO[bytes], log_format: LogFormat, kind: str) -> Log:
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    roles = _roles(url, parquet.schema_arrow.names, log_format)
    if parquet.metadata.num_rows == 0:
        raise UserError(f"{storage.display(url)}: no rows; give a file with interactions")
    schema = _schema_by_role(parquet.schema_arrow, roles)
    batches = parquet.iter_batches(_BATCH_ROWS, columns=list(roles.values()))
    return Log(url, "row", 1, roles, schema, _batches_by_role(url, kind, batches, roles))


def _open_text(url: str, file: IO[bytes], log_format: LogFormat, kind: str, head: bytes) -> Log:
    delimiter = _DELIMITERS[kind]
    line = next(line for line in _decoded(url, head).splitlines() if line.strip())
    fields = [field.strip(' "') for field in line.split(delimiter)]
    names, header = _column_names(log_format, kind, fields)
    roles = _roles(url, names, log_format, headless=not header)
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
    schema = _schema_by_role(reader.schema, roles)
    batches = _batches_by_role(url, kind, reader, roles)
    return Log(url, "line", 1 + header, roles, schema, batches)


def _decoded(url: str, head: bytes) -> str:
    # A head of full length may end inside a character, so only its whole lines are decoded.
    lines = head if len(head) < _HEAD_BYTES else head[: head.rfind(b"\n")]
    try:
        return lines.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = head.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{storage.display(url)}: line {line}: not UTF-8 text; convert it, or give --format"
        ) from None


def _column_names(log_format: LogFormat, kind: str, fields: list[str]) -> tuple[list[str], bool]:
    """Name the columns of a text file whose first line has ``fields``.

    Returns:
        The names, and whether the first line is a header.
    """
    if not log_format.columns and kind != "triples":
        return [field.split(":")[0] if kind == "inter" else field for field in fields], True
    known = log_format.columns or ROLES[: min(3, len(fields))]
    unnamed = (f"column {number + 1}" for number in range(len(known), len(fields)))
    return [*known, *unnamed], False


def _roles(
    url: str, names: list[str], log_format: LogFormat, headless: bool = False
) -> dict[str, str]:
    """Map each role to its column, by request or by a guess."""
    by_lower = {name.lower(): name for name in reversed(names)}
    found: dict[str, str] = {}
    for role in ROLES:
        asked = getattr(log_format, role)
        guesses = [by_lower[guess] for guess in _GUESSES[role].split() if guess in by_lower]
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
    fix = "pass --user-column and --item-column, or --columns if the file has no header"
    if headless:
        fix = "name them in --columns"
    return UserError(f"{storage.display(url)}: {what}; its columns are: {listed}; {fix}")


def _schema_by_role(schema: pa.Schema, roles: dict[str, str]) -> pa.Schema:
    return pa.schema([(role, schema.field(name).type) for role, name in roles.items()])


def _batches_by_role(
    url: str, kind: str, batches: Iterator[pa.RecordBatch], roles: dict[str, str]
) -> Iterator[pa.RecordBatch]:
    rows = 0
    with _explained(url, kind):
        for batch in batches:
            rows += len(batch)
            yield batch.select(list(roles.values())).rename_columns(list(roles))
    if rows == 0:
        raise UserError(f"{storage.display(url)}: no rows; give a file with interactions")


@contextmanager
def _explained(url: str, kind: str) -> Iterator[None]:
    """Turn what pyarrow and the decompressors raise into one line that names the file."""
    with storage.explained(url, "read"):
        try:
            yield
        except (pa.ArrowException, EOFError) as error:
            raise _damaged(url, kind, error) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise _damaged(url, kind, error) from None  # pyarrow reports corrupt data this way.


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
