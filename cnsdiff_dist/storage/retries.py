"""Trying an operation again while its failure may pass."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cnsdiff_dist.storage.failures import is_transient

_LONGEST_PAUSE = 10.0

_Result = TypeVar("_Result")


class Patience:
    """For how many seconds an operation is tried again, and how often one was.

    A command gives up after the default, because its user waits. A training that has begun
    sets more with :func:`patient` and so outlasts a store that is down for minutes.
    """

    seconds: float = 10.0
    retries: int = 0


patience = Patience()


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Set the seconds of :data:`patience`, for all threads, while the block runs."""
    before, patience.seconds = patience.seconds, seconds
    try:
        yield
    finally:
        patience.seconds = before


def retrying(call: Callable[[], _Result]) -> _Result:
    """Call, and call again while the failure may pass and :data:`patience` lasts.

    The pauses are random, so that a thousand ranks do not come back at once, and grow to 10 s.
    """
    deadline, ceiling = time.monotonic() + patience.seconds, 0.2
    while True:
        try:
            return call()
        except Exception as error:
            pause = random.uniform(ceiling / 4, ceiling)
            if not is_transient(error) or time.monotonic() + pause > deadline:
                raise
            patience.retries += 1
            time.sleep(pause)
            ceiling = min(2 * ceiling, _LONGEST_PAUSE)
