"""Files of a dataset as one local file, which can be memory-mapped.

A local file is used where it is. Remote files, and arrays in several files, are copied into one
file once per node, in a cache that the node's ranks share. The kernel keeps one copy of its pages
in memory for all of them.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO

from cnsdiff_dist import storage
from cnsdiff_dist.data.schema import Blob
from cnsdiff_dist.errors import UserError

_CHUNK = 1 << 22


def cache_dir() -> Path:
    """Return the directory of the cache: $CNSDIFF_CACHE, or else ~/.cache/cnsdiff_dist."""
    given = os.environ.get("CNSDIFF_CACHE")
    return Path(given) if given else Path("~/.cache/cnsdiff_dist").expanduser()


def local_file(url: str, blobs: Sequence[Blob], verify: bool) -> Path:
    """Return a local file with the bytes of ``blobs``, one after the other.

    Args:
        url: the dataset directory.
        verify: whether to read a local file whole to check its sha256, which takes about a second
            per gigabyte; one rank of a node is enough. A copy in the cache was checked when it
            was made.

    Raises:
        UserError: a file is missing, or its bytes are not those of the manifest.
    """
    sources = [storage.join(url, blob.path) for blob in blobs]
    if len(blobs) == 1 and storage.is_local(url):
        path = storage.local_path(sources[0])
        if not path.is_file():
            raise _missing(sources[0])
        if verify or path.stat().st_size != blobs[0].bytes:
            with path.open("rb") as file:
                _check(sources[0], hashlib.file_digest(file, "sha256").hexdigest(), blobs[0])
        return path
    key = hashlib.sha256(" ".join(blob.sha256 for blob in blobs).encode()).hexdigest()
    path = cache_dir() / key / Path(blobs[0].path).name
    with storage.explained(str(path), "write"), _locked(path.parent):
        # The first rank of a node that gets the lock fetches for all of them.
        if not path.is_file():
            with storage.replacing(path) as file:
                _fetch(sources, blobs, file)
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this node out; the kernel frees the lock of a killed process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(sources: list[str], blobs: Sequence[Blob], file: IO[bytes]) -> None:
    """Copy the sources in parallel to their positions in ``file``."""
    starts = list(accumulate((blob.bytes for blob in blobs), initial=0))
    os.truncate(file.fileno(), starts[-1])
    with ThreadPoolExecutor(min(8, len(blobs)), "fetch") as pool:
        jobs = [
            pool.submit(storage.retrying, partial(_fetch_one, source, blob, file.fileno(), start))
            for source, blob, start in zip(sources, blobs, starts[:-1], strict=True)
        ]
        for job in jobs:
            job.result()


def _fetch_one(source: str, blob: Blob, handle: int, start: int) -> None:
    if storage.is_local(source) and not storage.local_path(source).is_file():
        raise _missing(source)
    digest, size = hashlib.sha256(), 0
    with storage.open_read(source) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if size <= blob.bytes:  # A blob that is too long must not overwrite the next one.
                os.pwrite(handle, chunk, start + size - len(chunk))
    _check(source, digest.hexdigest(), blob)


def _check(source: str, found: str, blob: Blob) -> None:
    if found != blob.sha256:
        raise UserError(
            f"{storage.display(source)}: damaged: its sha256 is not the manifest's; "
            "run `cnsdiff prepare` again"
        )


def _missing(source: str) -> UserError:
    return UserError(f"{storage.display(source)}: cannot read: no such file; check the path")
