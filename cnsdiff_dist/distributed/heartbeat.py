"""Whose turn it is to be waited for in vain: every rank beats in the launcher's store.

A collective tells neither who is missing nor, behind the steps, when to give up. So each rank
writes a beat a second, and watches that of the next rank: one that stays silent for
``run.timeout_seconds`` is named, and its watcher ends, so that the launcher starts all anew.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from cnsdiff_dist import logs
from cnsdiff_dist.distributed.world import World, is_lost_peer
from cnsdiff_dist.errors import TryAgain, complain

_SECONDS = 1.0


class Peers:
    """Beats while the training runs; the step is told to the others. Alone, it does nothing."""

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self._world, self._timeout = world, timeout_seconds
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self._world.size > 1:
            # A connection of its own: one that waits for a key keeps the others of its client off.
            store: Any = _get_default_store()
            store = store.clone()
            store.set_timeout(timedelta(seconds=self._timeout))
            self._store = dist.PrefixStore("cnsdiff-beats", store)
            self._beat(0)
            threading.Thread(target=self._beat_on, name="beat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _beat_on(self) -> None:
        next_rank = (self._world.rank + 1) % self._world.size
        beats, seen, since = 0, [""], time.monotonic()
        while not self._over.wait(_SECONDS):
            beats += 1
            try:
                self._beat(beats)
                found = self._beats([next_rank]).get(next_rank, [""])
            except RuntimeError as error:
                if not self._over.is_set():
                    self._leave(f"the launcher's store does not answer ({_short(error)})")
            if found[0] != seen[0]:
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > self._timeout and not self._over.is_set():
                who = (
                    _named(next_rank, found) if found[0] else f"rank {next_rank}, which never beat"
                )
                self._leave(f"lost {who}: silent for {self._timeout:g} s (run.timeout_seconds)")

    def _beat(self, beats: int) -> None:
        step = logs.context.step or 0
        self._store.set(str(self._world.rank), f"{beats} {step} {socket.gethostname()}")

    def _beats(self, ranks: list[int]) -> dict[int, list[str]]:
        """Rank -> its beats so far, its step and its host, of those that have beaten."""
        keys = [str(rank) for rank in ranks if self._store.check([str(rank)])]
        values = self._store.multi_get(keys) if keys else []
        return {int(key): value.decode().split() for key, value in zip(keys, values, strict=True)}

    def _leave(self, why: str) -> None:
        complain(f"{why}; run again to go on")
        sys.stderr.flush()
        os._exit(TryAgain.exit_code)

    @contextmanager
    def named(self) -> Iterator[None]:
        """A collective's failure becomes a line that names the ranks that no longer beat.

        Raises:
            TryAgain: a peer was lost.
        """
        try:
            yield
        except RuntimeError as error:  # torch's DistError is one
            if self._world.size == 1 or not is_lost_peer(error):
                raise
            why = f"{self._missing()}; run again to go on (a collective: {_short(error)})"
            raise TryAgain(why) from error

    def _missing(self) -> str:
        """Beats are compared with themselves a little later: no clock is shared."""
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        try:
            before = self._beats(others)
            time.sleep(1.5 * _SECONDS)
            after = self._beats(others)
        except RuntimeError:
            return "the launcher's store is lost, and its node perhaps with it"
        silent = [rank for rank in before if before[rank][0] == after[rank][0]]
        if not silent:
            return "a collective failed, though every rank still answers"
        return "lost " + ", ".join(_named(rank, after[rank]) for rank in silent)


def _named(rank: int, beat: list[str]) -> str:
    return f"rank {rank} on {beat[2]} (step {beat[1]})"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
