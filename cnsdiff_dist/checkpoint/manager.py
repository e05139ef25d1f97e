"""The checkpoints of a run: saved behind the steps, committed by a marker, pruned, loaded.

A checkpoint is a directory, ``checkpoints/step-00000052/``, that torch.distributed.checkpoint
(DCP) writes. It counts only once it holds ``commit.json``, which is written last: object stores
have no rename, so this marker is the commit. It lists the other files with their sha256. A
directory without a marker is left from a killed run, and the next run removes it.

``checkpoints/owner.json`` names the training that may commit. A training that was cut off and
believed dead therefore stops once its successor has started.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch.distributed.checkpoint as dcp

from cnsdiff_dist import storage
from cnsdiff_dist.checkpoint.commit import (
    COMMIT,
    DAMAGED,
    NAME,
    Commit,
    committed_names,
    digest_of,
    file_damage,
    files_of,
    read_commit,
    record_damage,
    step_of,
)
from cnsdiff_dist.checkpoint.dcp_failures import explained_dcp, root_cause
from cnsdiff_dist.checkpoint.files import Files, Planner, Reader, Writer
from cnsdiff_dist.checkpoint.state import host_copy, refuse_without_space
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError

_OWNER = "owner.json"


@dataclass
class Costs:
    """What checkpoints have cost since the caller last reset this.

    ``count`` checkpoints kept the steps waiting for ``waited`` seconds, took ``written`` seconds
    to write in the background and have ``bytes`` on this rank.
    """

    count: int = 0
    waited: float = 0.0
    written: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written; ``keep`` and ``best_step`` are for the pruning."""

    step: int
    url: str
    state: dict[str, Any] = field(repr=False)
    record: dict[str, Any]
    keep: int
    best_step: int | None


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, run_url: str, world: World) -> None:
        self._url, self._world = storage.join(run_url, "checkpoints"), world
        self._token: str | None = None
        self._writing: Future[tuple[float, int]] | None = None
        self.costs = Costs()
        self.newest: Commit | None = None
        """The newest checkpoint that this process has committed, on rank 0."""

    # --- reading ----------------------------------------------------------------------------

    def committed(self) -> list[Commit]:
        """Return every committed checkpoint, oldest first; the same on every rank. Collective."""
        return [Commit(**entry) for entry in self._world.broadcast_object(self._scan())]

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
        """Say what is wrong with a checkpoint; None if its files are what was committed.

        Each rank reads a share of the files. Collective.
        """
        found = record_damage(commit)
        if found is None:
            names = sorted(commit.record["files"])[self._world.rank :: self._world.size]
            found = next(filter(None, (file_damage(commit, name) for name in names)), None)
        return next(filter(None, self._world.gather_objects(found)), None)

    def load(self, commit: Commit, state: dict[str, Any]) -> None:
        """Fill ``state`` in place from a checkpoint saved at any world size. Collective.

        Raises:
            UserError: the checkpoint is unreadable, or its model has other shapes.
        """
        with explained_dcp(commit.url, "read"):
            reader = Reader(commit.url, commit.record["files"])
            dcp.load(state, storage_reader=reader, planner=Planner())

    def set_aside(self, commit: Commit, why: str) -> None:
        """Make a damaged checkpoint uncommitted; the next prune removes its files. Collective."""
        if self._world.is_main:
            storage.write_json(f"{commit.url}/{DAMAGED}", {"damage": why})
            storage.delete_tree(f"{commit.url}/{COMMIT}")
        self._world.barrier()

    # --- writing ----------------------------------------------------------------------------

    def claim(self) -> None:
        """Make this training the only one that may commit here. Collective."""
        self._token, self._background = uuid.uuid4().hex, self._world.with_side_group()
        if self._world.is_main:
            owner = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid()}
            storage.write_json(f"{self._url}/{_OWNER}", owner)
        self._world.barrier()

    def save(
        self,
        step: int,
        state: dict[str, Any],
        record: dict[str, Any],
        keep: int = 1,
        best_step: int | None = None,
        background: bool = True,
    ) -> None:
        """Write and commit a checkpoint, then prune the others (:meth:`prune`). Collective.

        In the background, this returns once ``state`` is copied to host memory, and the next
        steps run meanwhile. Otherwise ``state`` is written without a copy and the training waits.
        ``record`` is what commit.json shall hold besides the files.

        Raises:
            UserError: the disk has no space, or the previous checkpoint failed (:meth:`wait`).
        """
        self.wait()
        if self._token is None:
            self.claim()
        started, url = time.monotonic(), storage.join(self._url, f"step-{step:08d}")
        refuse_without_space(self._url, state, self._world)
        saved = host_copy(state) if background else state
        pending = _Pending(step, url, saved, record, keep, best_step)
        pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing = pool.submit(self._write, pending)
        pool.shutdown(wait=False)
        self.costs.count += 1
        self.costs.waited += time.monotonic() - started
        if not background:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written, if any, is committed. Collective.

        Raises:
            UserError: on every rank, when one of them could not write; nothing is committed then.
        """
        writing, self._writing, started = self._writing, None, time.monotonic()
        if writing is not None:
            seconds, size = writing.result()
            self.costs.written += seconds
            self.costs.bytes += size
            self.costs.waited += time.monotonic() - started

    def _write(self, pending: _Pending) -> tuple[float, int]:
        """Write and commit, and return the seconds it took and the bytes of this rank.

        This runs in a thread of its own, so it uses the collectives of ``_background`` only.
        """
        started = time.monotonic()
        if self._world.is_main:
            storage.delete_tree(pending.url)  # left from a run that was killed at this very step
        self._background.barrier()
        files = self._write_files(pending)
        all_files: Files = {}
        for files_of_rank in self._background.gather_objects(files):
            all_files |= files_of_rank
        self._on_main(lambda: self._commit(pending, all_files, started))
        return time.monotonic() - started, sum(int(entry["bytes"]) for entry in files.values())

    def _write_files(self, pending: _Pending) -> Files:
        """Write the files, and write them all again while the failure may pass."""
        deadline = time.monotonic() + storage.patience.seconds
        while True:
            writer = Writer(pending.url)
            try:
                self._save_state(pending, writer)
                return writer.files
            except UserError as error:
                again = storage.is_transient(root_cause(error)) and time.monotonic() < deadline
                if not self._background.broadcast_object(again):
                    if self._world.is_main:
                        storage.delete_tree(pending.url)
                    raise
                storage.patience.retries += 1
                time.sleep(1.0)

    def _save_state(self, pending: _Pending, writer: Writer) -> None:
        group, alone = self._background.group, self._world.size == 1
        with explained_dcp(pending.url, "write"):
            dcp.save(pending.state, storage_writer=writer, process_group=group, no_dist=alone)

    def _commit(self, pending: _Pending, files: Files, started: float) -> None:
        self._refuse_other_owner()
        cost = {"time": time.time(), "write_seconds": time.monotonic() - started}
        record = {**pending.record, **cost, "files": files}
        record["digest"] = digest_of(record)
        storage.write_json(f"{pending.url}/{COMMIT}", record)
        self.newest = Commit(pending.step, pending.url, record)
        self.prune(pending.keep, pending.best_step)

    def _refuse_other_owner(self) -> None:
        owner = json.loads(storage.read_text(f"{self._url}/{_OWNER}"))
        if owner["token"] != self._token:
            raise UserError(
                f"{storage.display(self._url)}: another training ({owner['host']}, process "
                f"{owner['pid']}) took over this run; this one ends without committing"
            )

    def _on_main(self, act: Callable[[], None]) -> None:
        """Let rank 0 act, and raise its UserError on every rank."""
        failure: UserError | None = None
        if self._world.is_main:
            try:
                act()
            except UserError as error:
                failure = error
        failure = self._background.broadcast_object(failure)
        if failure is not None:
            raise failure

    def prune(self, keep: int, best_step: int | None) -> None:
        """Delete all checkpoints but the newest ``keep`` and that of step ``best_step``.

        Directories without a commit are deleted too. Call it on rank 0 only.
        """
        files = files_of(self._url)
        kept = set(committed_names(files)[::-1][:keep])
        for name in {path.partition("/")[0] for path in files} - kept:
            if NAME.match(name) and step_of(name) != best_step:
                # The marker goes first: a half-deleted checkpoint must not look committed.
                storage.delete_tree(f"{self._url}/{name}/{COMMIT}")
                storage.delete_tree(f"{self._url}/{name}")
