"""Who is missing when a collective fails: every rank beats in the launcher's store."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from cnsdiff_dist.errors import TryAgain
from cnsdiff_dist.world import World, is_lost_peer

_SECONDS = 1.0


class Peers:
    """Beats once a second while the training runs: rank -> host, beats so far, step."""

    def __init__(self, world: World) -> None:
        self._world, self.step, self._over = world, 0, threading.Event()
        self._store = dist.PrefixStore("cnsdiff-beats", _get_default_store())

    def __enter__(self) -> Self:
        if self._world.size > 1:
            self._beat(0)
            threading.Thread(target=self._beat_on, name="beat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _beat_on(self) -> None:
        beats = 0
        while not self._over.wait(_SECONDS):
            beats += 1
            try:
                self._beat(beats)
            except RuntimeError:
                return  # the store's host is gone; the collectives will notice

    def _beat(self, beats: int) -> None:
        self._store.set(str(self._world.rank), f"{beats} {self.step} {socket.gethostname()}")

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
            reason = " ".join(str(error).split())[:120]
            raise TryAgain(
                f"{self._missing()}; run again to go on (a collective: {reason})"
            ) from error

    def _missing(self) -> str:
        """Beats are compared with themselves a little later: no clock is shared."""
        try:
            before = self._beats()
            time.sleep(2.5 * _SECONDS)
            after = self._beats()
        except (RuntimeError, ValueError):
            return "the launcher's store is lost, and its node perhaps with it"
        silent = [rank for rank in before if before[rank][0] == after[rank][0]]
        if not silent:
            return "a collective failed, though every rank still answers"
        where = ", ".join(
            f"rank {rank} on {after[rank][2]} (step {after[rank][1]})" for rank in silent
        )
        return f"lost {where}"

    def _beats(self) -> dict[int, list[str]]:
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        values = self._store.multi_get([str(rank) for rank in others])
        return {rank: value.decode().split() for rank, value in zip(others, values, strict=True)}
