"""A private name in the launcher's store for each start of the ranks.

torchrun keeps one store for all its restarts, and torch 2.13 writes the ranks' addresses into it
under the same keys each time, so a restarted rank would read the addresses of dead ranks. No
number in the environment tells one start from another on every node, since each agent counts its
own restarts. The ranks that are alive therefore agree on a name, and use the store under that name.
"""

import json
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PAUSE_SECONDS = 0.05


def store_of_this_start(shared: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return the part of the shared store that only the ranks of this start use. Collective.

    Raises:
        RuntimeError: not every rank came within the timeout, or the store cannot be reached.
    """
    name = _agree_on_name(dist.PrefixStore("cnsdiff-rendezvous", shared), rank, size, timeout)
    return dist.PrefixStore(f"cnsdiff-start-{name}", shared)


def _agree_on_name(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Return the name that all living ranks acknowledge.

    Each rank writes a new random token. Rank 0 publishes a roster: a new name and the token of
    every rank. A rank that finds its own token in the roster acknowledges the roster's name, which
    holds once all ranks have acknowledged it.

    The tokens of dead ranks are still in the store. A roster with one of them is never
    acknowledged by all, and rank 0 publishes another when a living rank has overwritten the token.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"token-{rank}", token)
    acknowledged = ""
    while time.monotonic() < deadline:
        if rank == 0:
            _publish_roster(store, size)
        roster = _roster(store)
        if roster and len(roster["tokens"]) == size and roster["tokens"][rank] == token:
            name = str(roster["name"])
            if name != acknowledged:
                store.set(f"acknowledged-{name}-{rank}", "yes")
                acknowledged = name
            if store.check([f"acknowledged-{name}-{other}" for other in range(size)]):
                return name
        time.sleep(_PAUSE_SECONDS)
    raise RuntimeError(f"of {size} ranks, not all came within {timeout.total_seconds():g} s")


def _publish_roster(store: dist.Store, size: int) -> None:
    """Write a roster of the tokens that are in the store, unless the last one lists the same."""
    keys = [f"token-{rank}" for rank in range(size)]
    if not store.check(keys):
        return
    tokens = [token.decode() for token in store.multi_get(keys)]
    published = _roster(store)
    if published is None or published["tokens"] != tokens:
        store.set("roster", json.dumps({"name": uuid.uuid4().hex, "tokens": tokens}))


def _roster(store: dist.Store) -> dict[str, Any] | None:
    return json.loads(store.get("roster")) if store.check(["roster"]) else None
