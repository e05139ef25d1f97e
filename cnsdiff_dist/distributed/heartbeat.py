"""Every rank's heartbeat in the launcher's store, so that a lost rank is named.

A collective does not say which rank is missing, and one that runs beside the training (a
checkpoint) waits for hours. Each rank therefore writes a heartbeat to the store once a second and
watches that of the next rank. If it does not change for ``run.timeout_seconds``, the watching rank
names the lost one and ends, and the launcher starts all ranks again.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from cnsdiff_dist import logs
from cnsdiff_dist.distributed.world import World, is_lost_peer
from cnsdiff_dist.errors import TryAgain, complain

_INTERVAL_SECONDS = 1.0


class _Beat(NamedTuple):
    """One rank's entry in the store: the number of the beat, the global step and the host."""

    number: str
    step: str
    host: str


class Heartbeat:
    """Writes this rank's heartbeat and watches the next rank's while the context is open.

    A world of one rank has no heartbeat.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self._world, self._timeout = world, timeout_seconds
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        if self._world.size > 1:
            # Its own connection: a client that waits for a key blocks the client's other callers.
            store: Any = _get_default_store()
            store = store.clone()
            store.set_timeout(timedelta(seconds=self._timeout))
            self._store = dist.PrefixStore("cnsdiff-heartbeat", store)
            self._write(0)
            threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turn the failure of a collective into one line that names the ranks that are lost.

        Raises:
            TryAgain: another rank or the network failed.
        """
        try:
            yield
        except RuntimeError as error:  # torch's DistError is one
            if self._world.size == 1 or not is_lost_peer(error):
                raise
            why = f"{self._lost_ranks()}; run again to go on (a collective: {_short(error)})"
            raise TryAgain(why) from error

    def _run(self) -> None:
        next_rank = (self._world.rank + 1) % self._world.size
        seen: _Beat | None = None
        number, since = 0, time.monotonic()
        while not self._stopped.wait(_INTERVAL_SECONDS):
            number += 1
            try:
                self._write(number)
                beat = self._read([next_rank]).get(next_rank)
            except RuntimeError as error:
                if self._stopped.is_set():
                    return
                _end_process(f"the launcher's store does not answer ({_short(error)})")
            if beat != seen:
                seen, since = beat, time.monotonic()
            elif time.monotonic() - since > self._timeout and not self._stopped.is_set():
                who = _named(next_rank, beat) if beat else f"rank {next_rank}, which never beat"
                _end_process(f"lost {who}: silent for {self._timeout:g} s (run.timeout_seconds)")

    def _write(self, number: int) -> None:
        step = logs.context.step or 0
        self._store.set(str(self._world.rank), f"{number} {step} {socket.gethostname()}")

    def _read(self, ranks: list[int]) -> dict[int, _Beat]:
        """Return the heartbeat of each of the ranks that has written one."""
        keys = [str(rank) for rank in ranks if self._store.check([str(rank)])]
        values = self._store.multi_get(keys) if keys else []
        return {
            int(key): _Beat(*value.decode().split())
            for key, value in zip(keys, values, strict=True)
        }

    def _lost_ranks(self) -> str:
        """Say which ranks do not beat.

        Two readings of the store are compared, because the hosts' clocks may differ.
        """
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        try:
            before = self._read(others)
            time.sleep(1.5 * _INTERVAL_SECONDS)
            after = self._read(others)
        except RuntimeError:
            return "the launcher's store is lost, and its node perhaps with it"
        silent = [rank for rank in before if before[rank].number == after[rank].number]
        if not silent:
            return "a collective failed, though every rank still answers"
        return "lost " + ", ".join(_named(rank, after[rank]) for rank in silent)


def _end_process(why: str) -> NoReturn:
    """End at once: the main thread may wait in a collective that never returns."""
    complain(f"{why}; run again to go on")
    sys.stderr.flush()
    os._exit(TryAgain.exit_code)


def _named(rank: int, beat: _Beat) -> str:
    return f"rank {rank} on {beat.host} (step {beat.step})"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
