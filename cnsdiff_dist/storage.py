"""Files at any fsspec URL: the only module that opens one.

A plain path is a local file; anything with a scheme (``s3://``, ``gs://``, ``memory://``)
goes through fsspec. Whatever goes wrong outside this program (no such file, no permission,
no credentials, a full disk, an unreachable host) becomes one :class:`UserError` line that
names the URL, without its secrets, and what to do.
"""

import errno
import json
import lzma
import os
import random
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.utils import get_protocol

from cnsdiff_dist.errors import TryAgain, UserError

CONNECT_SECONDS = 4
READ_SECONDS = 30

_Result = TypeVar("_Result")

# Clients raise classes of their own for the same few causes; naming them avoids importing
# a client that is not installed. Looked up along the exception's bases.
_TRANSIENT = {
    "ConnectionError", "TimeoutError", "EndpointConnectionError", "ConnectTimeoutError",
    "ReadTimeoutError", "ConnectionClosedError", "ClientConnectorError", "ServerTimeoutError",
    "ServerDisconnectedError", "ClientPayloadError", "HTTPClientError", "IncompleteRead",
    "FSTimeoutError", "ResponseParserError", "ServiceUnavailable",
}  # fmt: skip
_TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "EIO",
        "ENETDOWN", "ENETUNREACH", "EPIPE", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound",
    "DefaultCredentialsError", "CredentialRetrievalError",
}  # fmt: skip


class Patience:
    """How long an operation whose failure may pass is tried again, and how often one was.

    A command gives up after ``seconds``, soon, since its user waits. A training that has begun
    has more (:func:`patient`): it outlasts a store that is down for minutes.
    """

    seconds: float = 10.0
    retries: int = 0


patience = Patience()


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Inside the block, in all threads, failures that may pass are tried again for so long."""
    before, patience.seconds = patience.seconds, seconds
    try:
        yield
    finally:
        patience.seconds = before


def protocol(url: str) -> str:
    """``file`` for a path, else the URL's scheme."""
    name = get_protocol(url)
    return "file" if name == "local" else name


def is_local(url: str) -> bool:
    return protocol(url) == "file"


def local_path(url: str) -> Path:
    """The path behind a local URL (``file://`` or a plain path)."""
    return Path(re.sub(r"^(file|local):(//)?", "", url)).expanduser()


def display(url: str) -> str:
    """The URL as it may be shown: without ``user:password@``, query and fragment."""
    if is_local(url):
        return str(local_path(url))
    return "::".join(_without_secrets(part) for part in url.split("::"))


def _without_secrets(url: str) -> str:
    scheme, mark, rest = re.split(r"[?#]", url, maxsplit=1)[0].rpartition("://")
    head, at, tail = rest.rpartition("@")
    # abfs://container@account has an @ and no secret; http://host:80/a@b has a port.
    user_info = head.partition("/")[0]
    if at and ":" in head and not (":" in user_info and user_info.rpartition(":")[2].isdigit()):
        rest = tail
    return f"{scheme}{mark}{rest}"


def refuse_secrets(url: str) -> None:
    """For URLs that are saved: no ``user:password@`` and no query, where tokens travel.

    Raises:
        UserError: the URL has one.
    """
    if display(url) != url and not is_local(url):
        raise UserError(
            f"{display(url)}: a URL with credentials or a query would be saved with the run; "
            "give credentials by the environment or a profile"
        )


def join(url: str, relative: str) -> str:
    """``relative`` under the directory ``url``.

    Raises:
        UserError: ``relative`` is absolute or climbs out of ``url``.
    """
    parts = PurePosixPath(relative).parts
    if not parts or relative.startswith("/") or ".." in parts or "://" in relative:
        raise UserError(f"{display(url)}: {relative!r} is not a path inside this directory")
    return f"{url.rstrip('/')}/{'/'.join(parts)}"


def _has(error: BaseException, names: set[str]) -> bool:
    return any(base.__name__ in names for base in type(error).__mro__)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: the network's or the server's fault, not ours."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    return _has(error, _TRANSIENT) or getattr(error, "errno", None) in _TRANSIENT_ERRNO


def explain(error: BaseException, url: str, action: str) -> UserError:
    """The one line to show for ``error``, met while trying to ``action`` (a verb) ``url``."""
    where, code = display(url), getattr(error, "errno", None)
    if isinstance(error, UserError):
        return error
    if _has(error, _NO_CREDENTIALS):
        return UserError(
            f"{where}: cannot {action}: no credentials; set them for "
            f"{protocol(url)} (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    if is_transient(error) and not is_local(url):
        return TryAgain(
            f"{where}: cannot {action}: the host does not answer; check the URL, the network "
            "and the endpoint (for s3: AWS_ENDPOINT_URL)"
        )
    if isinstance(error, FileNotFoundError):
        return UserError(f"{where}: cannot {action}: no such file or directory; check the path")
    if code == errno.ENOSPC or code == errno.EDQUOT:
        return UserError(f"{where}: cannot {action}: no space left; free some or write elsewhere")
    if code == errno.EROFS:
        return UserError(f"{where}: cannot {action}: read-only file system; write elsewhere")
    if isinstance(error, PermissionError):
        return UserError(f"{where}: cannot {action}: permission denied; check rights and keys")
    if isinstance(error, ImportError):
        return UserError(f"{where}: cannot {action}: {_line(error, url)}")
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UserError(f"{where}: cannot {action}: a file is in the way; choose another path")
    if isinstance(error, ValueError) and "rotocol" in str(error):
        return UserError(
            f"{where}: cannot {action}: unknown protocol {protocol(url)!r}; "
            "use a path, s3://, gs://, or another one that fsspec knows"
        )
    return UserError(f"{where}: cannot {action}: {_line(error, url)}")


def _line(error: BaseException, url: str) -> str:
    """The error's text on one line, without the secrets of any URL, ``url``'s above all."""
    text = " ".join(str(error).split()) or type(error).__name__
    for part in map(urlsplit, url.split("::")):
        login = part.netloc.rpartition("@")[0]
        for secret in (f"{login}@", login.partition(":")[2], f"?{part.query}", part.query):
            if secret.strip("?@"):
                text = text.replace(secret, "")
    return re.sub(r"://[^/@\s]+@", "://", text)[:300]


@contextmanager
def explained(url: str, action: str) -> Iterator[None]:
    """Turn what goes wrong with ``url`` inside the block into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, _EXPLAINED) or _foreign(error):
            raise explain(error, url, action) from error
        raise


# The last three: what decompressors raise.
_EXPLAINED = (OSError, ImportError, ValueError, EOFError, zlib.error, lzma.LZMAError)


def _foreign(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in {
        "botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs", "requests",
    }  # fmt: skip


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a URL, with timeouts, and the path inside it.

    Raises:
        UserError: unknown protocol, or its client is not installed.
    """
    options: dict[str, Any] = {"use_listings_cache": False} if not is_local(url) else {}
    kind = protocol(url)
    if kind in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"max_attempts": 0},  # s3fs retries by itself; twice would multiply
        }
    elif kind in ("http", "https"):
        import aiohttp

        limit = aiohttp.ClientTimeout(None, CONNECT_SECONDS, READ_SECONDS, CONNECT_SECONDS)
        options["client_kwargs"] = {"timeout": limit}
    with explained(url, "open"):
        fs, path = fsspec.core.url_to_fs(url, **options)
    if hasattr(fs, "retries"):
        fs.retries = 3  # a few within a second; `retrying` is for the long waits
    return fs, path


def retrying(call: Callable[[], _Result]) -> _Result:
    """Call, and again while the failure may pass and :data:`patience` lasts.

    Pauses grow to 10 s and are random, so that a thousand ranks do not come back at once.
    """
    deadline, ceiling = time.monotonic() + patience.seconds, 0.2
    while True:
        try:
            return call()
        except Exception as error:
            pause = random.uniform(ceiling / 4, ceiling)
            if not is_transient(error) or time.monotonic() + pause > deadline:
                raise
            patience.retries += 1
            time.sleep(pause)
            ceiling = min(2 * ceiling, 10.0)


def open_read(url: str, compression: str | None = None) -> IO[bytes]:
    """A binary, seekable file; ``compression="infer"`` decompresses by extension."""
    with explained(url, "read"):
        fs, path = filesystem(url)
        if is_local(url) and fs.isdir(path):
            raise UserError(f"{display(url)}: is a directory; name a file, or use a glob")
        return retrying(lambda: fs.open(path, "rb", compression=compression))


def read_bytes(url: str) -> bytes:
    def read() -> bytes:
        with fs.open(path, "rb") as file:
            return bytes(file.read())

    with explained(url, "read"):
        fs, path = filesystem(url)
        return retrying(read)


def size(url: str) -> int:
    """The bytes of a file."""
    with explained(url, "read"):
        fs, path = filesystem(url)
        return retrying(lambda: int(fs.size(path)))


def read_range(url: str, start: int, stop: int, action: str = "read") -> bytes:
    """Bytes [start, stop) of a file, fewer where it ends before; ``action`` is for the error."""

    def read() -> bytes:
        if is_local(url):  # past fsspec's buffers, which read ahead
            handle = os.open(local_path(url), os.O_RDONLY)
            try:
                return os.pread(handle, stop - start, start)
            finally:
                os.close(handle)
        return bytes(fs.cat_file(path, start=start, end=stop))

    with explained(url, action):
        fs, path = filesystem(url)
        return retrying(read)


def read_text(url: str) -> str:
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{display(url)}: not UTF-8 text at byte {error.start}") from None


def write_json(url: str, tree: Any) -> None:
    write_text(url, json.dumps(tree, indent=2) + "\n")


@contextmanager
def open_write(url: str) -> Iterator[IO[bytes]]:
    """Write a file that appears whole when the block ends, or not at all.

    Local: a temporary name beside it, then ``os.replace``. Remote: a temporary file on this
    machine (where ``TMPDIR`` says), then one put, which is atomic in an object store.
    """
    with explained(url, "write"):
        if is_local(url):
            with replacing(local_path(url)) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile(prefix="cnsdiff-") as copy:
            yield copy
            copy.flush()
            upload(Path(copy.name), url)


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A local file that appears whole when the block ends, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_bytes(url: str, data: bytes) -> None:
    with open_write(url) as file:
        file.write(data)


def write_text(url: str, text: str) -> None:
    write_bytes(url, text.encode("utf-8"))


def exists(url: str) -> bool:
    """Whether a file, or a directory (prefix) with something in it, is there."""
    with explained(url, "look at"):
        fs, path = filesystem(url)
        return retrying(lambda: bool(fs.exists(path)))


def list_files(url: str) -> list[str]:
    """Every file under a directory, sorted, relative to it; empty when there is none."""
    with explained(url, "list"):
        fs, path = filesystem(url)
        found = retrying(lambda: list(fs.find(path)))
        base = path.rstrip("/") + "/"
        return sorted(name[len(base) :] for name in found if name.startswith(base))


def glob(pattern: str) -> list[str]:
    """The URLs a pattern matches, sorted; a URL without ``*?[`` is returned as it is.

    In http URLs only ``*`` is a mark: the others have a meaning of their own.

    Raises:
        UserError: nothing matches.
    """
    marks = "*" if protocol(pattern) in ("http", "https") else "*?["
    if not any(mark in pattern for mark in marks):
        return [pattern]
    with explained(pattern, "list"):
        fs, path = filesystem(pattern)
        found = sorted(str(name) for name in retrying(lambda: list(fs.glob(path))))
    if not found:
        raise UserError(f"{display(pattern)}: no file matches; check the pattern and quote it")
    return found if is_local(pattern) else [str(fs.unstrip_protocol(name)) for name in found]


def is_link(url: str) -> bool:
    return is_local(url) and local_path(url).is_symlink()


def delete_tree(url: str) -> None:
    """Delete a file, or a directory and all in it; nothing there is fine."""
    with explained(url, "delete"):
        if is_local(url):
            path = local_path(url)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        fs, remote = filesystem(url)
        with suppress(FileNotFoundError):
            retrying(lambda: fs.rm(remote, recursive=True))


def upload(source: Path, url: str) -> None:
    """Copy a local file to a URL."""
    with explained(url, "write"):
        fs, path = filesystem(url)
        retrying(lambda: fs.put_file(str(source), path))
