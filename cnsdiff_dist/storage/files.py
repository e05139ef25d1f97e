"""Reading, writing, listing and deleting files at any URL.

Every function raises :class:`UserError` for a failure outside this program and tries again what
may pass (:mod:`cnsdiff_dist.storage.retries`), unless it says otherwise.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec

from cnsdiff_dist.errors import UserError
from cnsdiff_dist.storage.failures import explained
from cnsdiff_dist.storage.retries import retrying
from cnsdiff_dist.storage.urls import display, is_local, local_path, protocol

_CONNECT_SECONDS = 4
_READ_SECONDS = 30


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the fsspec filesystem of a URL, with timeouts, and the path inside it.

    Raises:
        UserError: unknown protocol, or its client is not installed.
    """
    options = {} if is_local(url) else {"use_listings_cache": False, **_timeouts(url)}
    with explained(url, "open"):
        fs, path = fsspec.core.url_to_fs(url, **options)
    if hasattr(fs, "retries"):
        fs.retries = 3  # s3fs's own take less than a second; `retrying` does the long waits
    return fs, path


def _timeouts(url: str) -> dict[str, Any]:
    if protocol(url) in ("s3", "s3a"):
        retries = {"max_attempts": 0}  # s3fs retries too, and the two numbers would multiply
        timeouts = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
        return {"config_kwargs": {**timeouts, "retries": retries}}
    if protocol(url) in ("http", "https"):
        import aiohttp  # not at the top: it takes 0.2 s to import, and few commands need it

        limit = aiohttp.ClientTimeout(
            total=None,
            connect=_CONNECT_SECONDS,
            sock_read=_READ_SECONDS,
            sock_connect=_CONNECT_SECONDS,
        )
        return {"client_kwargs": {"timeout": limit}}
    return {}


def open_read(url: str, compression: str | None = None) -> IO[bytes]:
    """Open a binary, seekable file; ``compression="infer"`` decompresses by extension."""
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


def read_text(url: str) -> str:
    """Read a file of UTF-8 text."""
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{display(url)}: not UTF-8 text at byte {error.start}") from None


def read_range(url: str, start: int, stop: int, action: str = "read") -> bytes:
    """Read the bytes [start, stop) of a file, or fewer where the file ends before ``stop``.

    ``action`` is the verb of the error line, see :func:`explain`.
    """

    def read() -> bytes:
        if is_local(url):  # not through fsspec, whose buffers read ahead
            handle = os.open(local_path(url), os.O_RDONLY)
            try:
                return os.pread(handle, stop - start, start)
            finally:
                os.close(handle)
        return bytes(fs.cat_file(path, start=start, end=stop))

    with explained(url, action):
        fs, path = filesystem(url)
        return retrying(read)


def size(url: str) -> int:
    """Return the size of a file in bytes."""
    with explained(url, "read"):
        fs, path = filesystem(url)
        return retrying(lambda: int(fs.size(path)))


def exists(url: str) -> bool:
    """Whether there is a file, or a directory (prefix) with something in it."""
    with explained(url, "look at"):
        fs, path = filesystem(url)
        return retrying(lambda: bool(fs.exists(path)))


def is_link(url: str) -> bool:
    return is_local(url) and local_path(url).is_symlink()


def list_files(url: str) -> list[str]:
    """Return every file under a directory, relative to it and sorted; none if it is missing."""
    with explained(url, "list"):
        fs, path = filesystem(url)
        found = retrying(lambda: list(fs.find(path)))
        base = path.rstrip("/") + "/"
        return sorted(name[len(base) :] for name in found if name.startswith(base))


def glob(pattern: str) -> list[str]:
    """Return the URLs that a pattern matches, sorted; a URL without ``*?[`` is its own match.

    In http URLs only ``*`` is a wildcard, because ``?`` and ``[`` have a meaning of their own.

    Raises:
        UserError: nothing matches.
    """
    wildcards = "*" if protocol(pattern) in ("http", "https") else "*?["
    if not any(wildcard in pattern for wildcard in wildcards):
        return [pattern]
    with explained(pattern, "list"):
        fs, path = filesystem(pattern)
        found = sorted(str(name) for name in retrying(lambda: list(fs.glob(path))))
    if not found:
        raise UserError(f"{display(pattern)}: no file matches; check the pattern and quote it")
    return found if is_local(pattern) else [str(fs.unstrip_protocol(name)) for name in found]


@contextmanager
def open_write(url: str) -> Iterator[IO[bytes]]:
    """Write a file that appears whole when the block ends, or not at all.

    A remote file is first a temporary file on this machine (in ``TMPDIR``) and then one put,
    which is atomic in an object store.
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
    """Write a local file that appears whole when the block ends, or not at all.

    It is written under a temporary name beside ``target`` and renamed. An OSError is raised as
    it is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp lets only the owner read
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_bytes(url: str, data: bytes) -> None:
    with open_write(url) as file:
        file.write(data)


def write_text(url: str, text: str) -> None:
    write_bytes(url, text.encode("utf-8"))


def write_json(url: str, tree: Any) -> None:
    write_text(url, json.dumps(tree, indent=2) + "\n")


def upload(source: Path, url: str) -> None:
    """Copy a local file to a URL."""
    with explained(url, "write"):
        fs, path = filesystem(url)
        retrying(lambda: fs.put_file(str(source), path))


def delete_tree(url: str) -> None:
    """Delete a file, or a directory with all that is in it; a missing one is no error."""
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
