"""Ranks find each other in a store that holds entries of ranks that have died."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cnsdiff_dist.distributed.rendezvous import _agree_on_name

_LONG, _SHORT = timedelta(seconds=30), timedelta(seconds=0.3)


@pytest.fixture(scope="module")
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _client(server: dist.TCPStore, name: str) -> dist.Store:
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=_LONG)
    return dist.PrefixStore(name, store)


def _start(server: dist.TCPStore, name: str, size: int, late: list[float]) -> list[str]:
    """Start some ranks, each a little later; the name that each gives to this start."""

    def rank(index: int) -> str:
        store = _client(server, name)
        time.sleep(late[index])
        return _agree_on_name(store, index, size, _LONG)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def test_starts_in_one_store_have_names_of_their_own(server: dist.TCPStore) -> None:
    seen = set()
    for size in (3, 3, 2, 4, 3, 1, 3):
        late = [random.random() / 5 for _ in range(size)]
        (name,) = set(_start(server, "restarts", size, late))
        assert name not in seen
        seen.add(name)


@settings(max_examples=8)
@given(dead=st.sets(st.integers(0, 2)), late=st.lists(st.floats(0, 0.3), min_size=3, max_size=3))
def test_ranks_that_died_while_joining_do_no_harm(
    server: dist.TCPStore, dead: set[int], late: list[float]
) -> None:
    """Some ranks write their entries and perhaps answer, and die; then all ranks start again."""
    where = f"died-{random.random()}"

    def half_a_start(rank: int) -> None:
        with pytest.raises(RuntimeError, match="not all came"):
            _agree_on_name(_client(server, where), rank, 4, _SHORT)

    threads = [threading.Thread(target=half_a_start, args=(rank,)) for rank in dead]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(_start(server, where, 3, late))) == 1
