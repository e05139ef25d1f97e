"""One torch.distributed.checkpoint tree per checkpoint, committed by a file written last.

``checkpoints/step-00000052/`` counts only once it holds ``commit.json``: object stores have
no rename, so the marker is the commit. What has none is debris of a killed run and is
removed by the next one.
"""

import errno
import json
import logging
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import EnumType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from cnsdiff_dist import storage
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.world import World

_COMMIT = "commit.json"
# Whole names: what a module imports, such as os, could be reached by a dotted one.
_KNOWN = {
    "torch": {"Size"} | {name for name, value in vars(torch).items() if type(value) is torch.dtype},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata",
        "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
    },
}  # fmt: skip
_NAME = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint: its global step, its URL, and the JSON written with it."""

    step: int
    url: str
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, run_url: str, world: World) -> None:
        self._url, self._world = storage.join(run_url, "checkpoints"), world

    def committed(self) -> list[Commit]:
        """Every committed checkpoint, oldest first; the same on every rank."""
        return [Commit(**entry) for entry in self._world.broadcast(self._scan())]

    def _scan(self) -> list[dict[str, Any]]:
        if not self._world.is_main:
            return []
        names = _committed(storage.list_files(self._url))
        urls = [storage.join(self._url, name) for name in names]
        return [
            {"step": _step(name), "url": url, "record": _read_commit(url)}
            for name, url in zip(names, urls, strict=True)
        ]

    def save(self, step: int, state: dict[str, Any], record: dict[str, Any]) -> None:
        """Write and commit. Collective.

        Raises:
            UserError: a rank cannot write; no commit is left.
        """
        url = storage.join(self._url, f"step-{step:08d}")
        if self._world.is_main:
            storage.delete_tree(url)  # debris of a run that was killed at this very step
        self._world.barrier()
        try:
            with _one_line(url, "write"):
                dcp.save(state, storage_writer=FsspecWriter(url))
        except UserError:
            if self._world.is_main:
                storage.delete_tree(url)
            raise
        if self._world.is_main:
            storage.write_json(f"{url}/{_COMMIT}", record)
        self._world.barrier()

    def load(self, commit: Commit, state: dict[str, Any]) -> None:
        """Fill ``state`` in place from a checkpoint saved at any world size. Collective.

        Raises:
            UserError: unreadable, or of a model with other shapes.
        """
        with _one_line(commit.url, "read"):
            dcp.load(state, storage_reader=_Reader(commit.url))

    def prune(self, keep: int, best_step: int | None) -> None:
        """Delete all but the newest ``keep`` and the best, and what was never committed."""
        if not self._world.is_main:
            return
        files = storage.list_files(self._url)
        kept = set(_committed(files)[::-1][:keep])
        for name in {path.partition("/")[0] for path in files} - kept:
            if _NAME.match(name) and _step(name) != best_step:
                # The marker first: a half-deleted checkpoint must not look committed.
                storage.delete_tree(f"{self._url}/{name}/{_COMMIT}")
                storage.delete_tree(f"{self._url}/{name}")


def _committed(files: list[str]) -> list[str]:
    """The names of committed checkpoints among files relative to checkpoints/, oldest first."""
    names = [name for name, _, file in (path.partition("/") for path in files) if file == _COMMIT]
    return sorted(filter(_NAME.match, names), key=_step)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _read_commit(url: str) -> dict[str, Any]:
    where = f"{url}/{_COMMIT}"
    try:
        record: dict[str, Any] = json.loads(storage.read_text(where))
    except ValueError:
        raise UserError(f"{storage.display(where)}: not JSON; delete this checkpoint") from None
    return record


class _Reader(FsspecReader):
    """Reads ``.metadata``, a pickle, without running what it does not know.

    The tensors themselves are loaded by torch with ``weights_only``.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python before 3.11.4 pickles one
        if name not in _KNOWN.get(module, ()):
            raise ValueError(f"its .metadata names {module}.{name}: not a checkpoint of ours")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    if not isinstance(owner, EnumType):
        raise ValueError(f"its .metadata asks for {name} of no enum: not a checkpoint of ours")
    return owner[name]


@contextmanager
def _one_line(url: str, action: str) -> Iterator[None]:
    """Quiet DCP's planner, and name the cause of a rank's failure in one line."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise UserError(f"{_cause(cause, url, action)} (rank {rank})") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise _cause(error, url, action) from error


def _cause(error: BaseException, url: str, action: str) -> UserError:
    if action == "write" and "unexpected pos" in str(error):
        error = OSError(errno.ENOSPC, "")  # how torch's writer reports a short write
    return storage.explain(error, url, action)
