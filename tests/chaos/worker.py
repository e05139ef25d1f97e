"""What the ranks of a chaos run execute: the product, with a trace of every step it trains.

The product has no hooks for tests, so ``Trainer.take_step`` is wrapped here. Rows of a batch are in
stream order, so a hash per stream can be compared between worlds of different sizes.
"""

import functools
import hashlib
import json
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def stream_hashes(batch: Any) -> dict[str, str]:
    """A hash of the users, items and weights of each of the rank's streams in a step."""
    sides = [
        side.reshape(len(batch.streams), -1) for side in (batch.users, batch.items, batch.weight)
    ]
    return {
        str(stream): hashlib.sha256(
            b"".join(np.ascontiguousarray(side[place]).tobytes() for side in sides)
        ).hexdigest()
        for place, stream in enumerate(batch.streams)
    }


class Trace:
    """A file of one process, with a line for each step; each line is one write, so it is whole."""

    def __init__(self, folder: Path) -> None:
        launch, restart = os.environ["CHAOS_LAUNCH"], os.environ.get("TORCHELASTIC_RESTART_COUNT")
        self._attempt = f"{launch}.{restart}.{os.getpid()}"
        path = folder / f"{self._attempt}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, batch: Any) -> None:
        record = {
            "attempt": self._attempt,
            "rank": int(os.environ["RANK"]),
            "size": int(os.environ["WORLD_SIZE"]),
            "epoch": int(batch.epoch),
            "step": int(batch.step),
            "hashes": stream_hashes(batch),
        }
        os.write(self._file, json.dumps(record).encode() + b"\n")


def traced(step: Callable[..., Any], trace: Trace, pause: float) -> Callable[..., Any]:
    @functools.wraps(step)
    def wrapper(trainer: Any, ready: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(trainer, ready, *args, **kwargs)
        trace.write(ready.batch)
        time.sleep(pause)  # a run of few steps that still lasts long enough to be disturbed
        return result

    return wrapper


def sleep_by_select() -> None:
    """Make time.sleep use select, whose timeout is relative.

    Python's sleep passes a deadline of the monotonic clock. libfaketime 0.9.10 takes it for one of
    the clock that it fakes, and the sleep fails.
    """
    time.sleep = lambda seconds: select.select([], [], [], seconds) and None


def main() -> None:
    if "FAKETIME_TIMESTAMP_FILE" in os.environ:
        sleep_by_select()
    from cnsdiff_dist import cli

    cli.quiet()
    from cnsdiff_dist.training.loop import Trainer

    trace = Trace(Path(os.environ["CHAOS_TRACE"]))
    pause = float(os.environ.get("CHAOS_STEP_SECONDS", "0"))
    Trainer.take_step = traced(  # type: ignore[method-assign]
        Trainer.take_step, trace, pause
    )
    cli.entry()


if __name__ == "__main__":
    main()
