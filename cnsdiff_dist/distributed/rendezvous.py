"""Which processes belong to this start of a world, when restarts share a store.

torchrun keeps one store for all its restarts, and torch 2.13 writes the ranks' addresses into it
under the same names each time: a restarted rank would find those of the dead. No number in the
environment tells one start from another on every node (each agent counts its own restarts). So the
living find each other first, and then use names of their own.
"""

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_PAUSE = 0.05


def store_of_this_start(timeout: timedelta) -> dist.Store | None:
    """Under a torchrun that shares its store: that store, under a name which only the processes of
    this start know. None otherwise. Collective.

    Raises:
        RuntimeError: not every rank came in time, or the store cannot be reached.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    names = _call_roll(dist.PrefixStore("cnsdiff-roll", shared), rank, size, timeout)
    return dist.PrefixStore(f"cnsdiff-start-{names}", shared)


def _call_roll(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Every rank says a word that nobody said before. Rank 0 reads out the words it has heard; who
    hears his own answers; once all have answered to one reading, it holds.

    The words of dead ranks are still in the store: a reading with one of them in it is never
    answered by all, and rank 0 reads again when a living rank has spoken over it.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"word-{rank}", mine)
    answered = ""
    while time.monotonic() < deadline:
        if rank == 0:
            _read_out(store, size)
        if store.check(["reading"]):
            reading = json.loads(store.get("reading"))
            if len(reading["words"]) == size and reading["words"][rank] == mine:
                name = str(reading["name"])
                if name != answered:
                    store.set(f"answer-{name}-{rank}", "here")
                    answered = name
                if store.check([f"answer-{name}-{other}" for other in range(size)]):
                    return name
        time.sleep(_PAUSE)
    raise RuntimeError(f"of {size} ranks, not all came within {timeout.total_seconds():g} s")


def _read_out(store: dist.Store, size: int) -> None:
    keys = [f"word-{rank}" for rank in range(size)]
    if not store.check(keys):
        return
    words = [word.decode() for word in store.multi_get(keys)]
    if not store.check(["reading"]) or json.loads(store.get("reading"))["words"] != words:
        store.set("reading", json.dumps({"name": uuid.uuid4().hex, "words": words}))
