"""One torch.distributed.checkpoint tree per checkpoint, committed by a file written last.

``checkpoints/step-00000052/`` counts only once it holds ``commit.json``: object stores have
no rename, so the marker is the commit. It lists the other files with their sha256. What has no
marker is debris of a killed run and is removed by the next one. ``checkpoints/owner.json`` names
the training that may commit: one that was cut off and thought dead must not go on beside its
successor.
"""

import copy
import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import socket
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import CheckpointException

from cnsdiff_dist import storage
from cnsdiff_dist.checkpoint.commit import (
    COMMIT,
    DAMAGED,
    NAME,
    Commit,
    committed_names,
    digest_of,
    files_of,
    read_commit,
    record_damage,
    step_of,
)
from cnsdiff_dist.checkpoint.files import Files, Planner, Reader, Writer, local_tensors
from cnsdiff_dist.distributed.world import World, is_lost_peer
from cnsdiff_dist.errors import UserError

_OWNER = "owner.json"
_FAULTS = (OSError, ValueError, RuntimeError)
# What a checkpoint that means harm makes torch, pickle and zipfile raise, besides what disks do.
_HARM = (
    *_FAULTS, TypeError, LookupError, AttributeError, AssertionError,
    EOFError, OverflowError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile,
    NotImplementedError,
)  # fmt: skip


@dataclass
class Costs:
    """What checkpoints cost since last asked: how many, seconds a step had to wait for them,
    seconds they took behind the steps, bytes of this rank."""

    count: int = 0
    waited: float = 0.0
    written: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class _Job:
    """What a checkpoint that is being written needs; ``keep`` and ``best`` for the pruning."""

    step: int
    url: str
    state: dict[str, Any] = field(repr=False)
    record: dict[str, Any]
    keep: int
    best: int | None


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, run_url: str, world: World) -> None:
        self._url, self._world = storage.join(run_url, "checkpoints"), world
        self._token: str | None = None
        self._writing: Future[tuple[float, int]] | None = None
        self.costs = Costs()
        self.newest: Commit | None = None  # that this process, as rank 0, has committed

    # --- what is there --------------------------------------------------------------------

    def committed(self) -> list[Commit]:
        """Every committed checkpoint, oldest first; the same on every rank."""
        return [Commit(**entry) for entry in self._world.broadcast(self._scan())]

    def _scan(self) -> list[dict[str, Any]]:
        if not self._world.is_main:
            return []
        names = committed_names(files_of(self._url))
        urls = [storage.join(self._url, name) for name in names]
        return [
            {"step": step_of(name), "url": url, "record": read_commit(url)}
            for name, url in zip(names, urls, strict=True)
        ]

    def damage(self, commit: Commit) -> str | None:
        """What is wrong with a checkpoint's files, in words; None if they are what was committed.
        Each rank reads a share of them. Collective."""
        found = record_damage(commit)
        if found is None:
            names = sorted(commit.record["files"])[self._world.rank :: self._world.size]
            found = next(filter(None, (_file_damage(commit, name) for name in names)), None)
        return next(filter(None, self._world.gather_objects(found)), None)

    def load(self, commit: Commit, state: dict[str, Any]) -> None:
        """Fill ``state`` in place from a checkpoint saved at any world size. Collective.

        Raises:
            UserError: unreadable, or of a model with other shapes.
        """
        with _one_line(commit.url, "read"):
            reader = Reader(commit.url, commit.record["files"])
            dcp.load(state, storage_reader=reader, planner=Planner())

    def set_aside(self, commit: Commit, why: str) -> None:
        """Take a damaged checkpoint's commit back; the next prune removes the rest of it."""
        if self._world.is_main:
            storage.write_json(f"{commit.url}/{DAMAGED}", {"damage": why})
            storage.delete_tree(f"{commit.url}/{COMMIT}")
        self._world.barrier()

    # --- writing ----------------------------------------------------------------------------

    def claim(self) -> None:
        """From now on only this training may commit here. Collective."""
        self._token, self._behind = uuid.uuid4().hex, self._world.apart()
        if self._world.is_main:
            owner = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid()}
            storage.write_json(f"{self._url}/{_OWNER}", owner)
        self._world.barrier()

    def save(
        self, step: int, state: dict[str, Any], record: dict[str, Any], keep: int = 1,
        best: int | None = None, background: bool = True,
    ) -> None:  # fmt: skip
        """Copy ``state`` to the host, and write and commit it behind the next steps; then delete
        all but the newest ``keep`` and that of step ``best``. Not in the ``background``, it is
        written without a copy while the training waits. Collective.

        Raises:
            UserError: there is no room, or the checkpoint before this one failed (:meth:`wait`).
        """
        self.wait()
        if self._token is None:
            self.claim()
        started, url = time.monotonic(), storage.join(self._url, f"step-{step:08d}")
        _refuse_without_room(self._url, state, self._world)
        job = _Job(step, url, _host_copy(state) if background else state, record, keep, best)
        pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing = pool.submit(self._write, job)
        pool.shutdown(wait=False)
        self.costs.count += 1
        self.costs.waited += time.monotonic() - started
        if not background:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written, if any, is committed. Collective.

        Raises:
            UserError: on every rank, when one of them could not write; there is no commit then.
        """
        writing, self._writing, started = self._writing, None, time.monotonic()
        if writing is not None:
            seconds, size = writing.result()
            self.costs.written += seconds
            self.costs.bytes += size
            self.costs.waited += time.monotonic() - started

    def _write(self, job: _Job) -> tuple[float, int]:
        """Seconds it took, and bytes of this rank. Its collectives are those of ``_behind``."""
        started = time.monotonic()
        if self._world.is_main:
            storage.delete_tree(job.url)  # debris of a run that was killed at this very step
        self._behind.barrier()
        files = self._write_files(job)
        everyones: Files = {}
        for ranks in self._behind.gather_objects(files):
            everyones |= ranks
        self._agreed(lambda: self._commit(job, everyones, started))
        return time.monotonic() - started, sum(int(entry["bytes"]) for entry in files.values())

    def _write_files(self, job: _Job) -> Files:
        """Write the tree; from the start again while what failed may pass."""
        deadline = time.monotonic() + storage.patience.seconds
        while True:
            writer = Writer(job.url)
            try:
                with _one_line(job.url, "write"):
                    dcp.save(
                        job.state, storage_writer=writer, process_group=self._behind.group,
                        no_dist=self._world.size == 1,
                    )  # fmt: skip
                return writer.files
            except UserError as error:
                again = storage.is_transient(_root(error)) and time.monotonic() < deadline
                if not self._behind.broadcast(again):
                    if self._world.is_main:
                        storage.delete_tree(job.url)
                    raise
                storage.patience.retries += 1
                time.sleep(1.0)

    def _commit(self, job: _Job, files: Files, started: float) -> None:
        self._refuse_other_owner()
        cost = {"time": time.time(), "write_seconds": time.monotonic() - started}
        record = {**job.record, **cost, "files": files}
        record["digest"] = digest_of(record)
        storage.write_json(f"{job.url}/{COMMIT}", record)
        self.newest = Commit(job.step, job.url, record)
        self.prune(job.keep, job.best)

    def _refuse_other_owner(self) -> None:
        owner = json.loads(storage.read_text(f"{self._url}/{_OWNER}"))
        if owner["token"] != self._token:
            raise UserError(
                f"{storage.display(self._url)}: another training ({owner['host']}, process "
                f"{owner['pid']}) took over this run; this one ends without committing"
            )

    def _agreed(self, act: Callable[[], None]) -> None:
        """Have rank 0 act, and every rank fail if it does."""
        failure: UserError | None = None
        if self._world.is_main:
            try:
                act()
            except UserError as error:
                failure = error
        failure = self._behind.broadcast(failure)
        if failure is not None:
            raise failure

    def prune(self, keep: int, best_step: int | None) -> None:
        """Delete all but the newest ``keep`` and the best, and what was never committed."""
        files = files_of(self._url)
        kept = set(committed_names(files)[::-1][:keep])
        for name in {path.partition("/")[0] for path in files} - kept:
            if NAME.match(name) and step_of(name) != best_step:
                # The marker first: a half-deleted checkpoint must not look committed.
                storage.delete_tree(f"{self._url}/{name}/{COMMIT}")
                storage.delete_tree(f"{self._url}/{name}")


def _file_damage(commit: Commit, name: str) -> str | None:
    """What is wrong with one file of a checkpoint; it is read whole, about 2 s a gigabyte."""
    url, expected = storage.join(commit.url, name), commit.record["files"][name]

    def digest() -> tuple[int, str]:
        with storage.open_read(url) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            return file.seek(0, os.SEEK_END), sha256

    if not storage.exists(url):
        return f"{name} is missing"
    with storage.explained(url, "read"):
        size, sha256 = storage.retrying(digest)
    if size != expected["bytes"]:
        return f"{name} has {size} bytes, not {expected['bytes']}"
    return (
        None if sha256 == expected["sha256"] else f"the sha256 of {name} is not the committed one"
    )


def _refuse_without_room(url: str, state: dict[str, Any], world: World) -> None:
    """
    Raises:
        UserError: on every rank, when a local disk has no room for the ranks of its node.
    """
    if not storage.is_local(url):
        return
    folder = storage.local_path(url)
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in local_tensors(state)) * world.local_size
    free = shutil.disk_usage(folder).free
    short = (
        f"{folder}: a checkpoint needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} are free"
    )
    lines = world.gather_objects(short if free < needed else None)
    if line := next(filter(None, lines), None):
        raise UserError(f"{line}; free some, lower checkpoint.keep, or move run.dir")


def _host_copy(state: Any) -> Any:
    """A checkpoint tree that the next steps do not change."""
    if isinstance(state, dict):
        return {key: _host_copy(value) for key, value in state.items()}
    if isinstance(state, ShardedTensor) and not state.local_shards():
        return state
    return copy.deepcopy(state) if state.device.type == "cpu" else state.to(device="cpu")


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
            line = _cause(cause, url, action)
            raise type(line)(f"{line} (rank {rank})") from cause
        except _HARM as error:
            if is_lost_peer(error) or (action == "write" and not isinstance(error, _FAULTS)):
                raise  # Peers names the rank; the others are bugs
            raise _cause(error, url, action) from error


def _cause(error: BaseException, url: str, action: str) -> UserError:
    if action == "write" and "unexpected pos" in str(error):
        error = OSError(errno.ENOSPC, "")  # how torch's writer reports a short write
    return storage.explain(error, url, action)


def _root(error: BaseException) -> BaseException:
    return error.__cause__ or error
