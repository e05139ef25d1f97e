"""SIGTERM as the notice that the platform will soon take its node back.

The first SIGTERM asks all ranks to stop at the same step boundary and checkpoint there: they
agree on it by :class:`cnsdiff_dist.distributed.world.Vote`, in ``training/loop.py``. A second
one more than a second later, or the end of the grace, ends the process at once. Committed
checkpoints are safe in any case.
"""

import os
import select
import signal
import sys
import threading
import time
from contextlib import ExitStack
from typing import Self

from cnsdiff_dist import logs
from cnsdiff_dist.errors import TryAgain

# A SIGTERM that is sent to a whole tree of processes comes a second time, from torchrun.
_ECHO_SECONDS = 1.0


class Preemption:
    """Watches for SIGTERM from its own thread; ``asked`` is set at the first one.

    Python runs a signal handler between two instructions of the main thread, which may wait in a
    collective for minutes. The interpreter writes the signal's number into a pipe at once, and the
    thread reads the pipe.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.asked = threading.Event()
        self._grace, self._undo = grace_seconds, ExitStack()

    def __enter__(self) -> Self:
        return self

    def watch(self) -> None:
        """Start to watch. Until then SIGTERM ends the process, which has nothing to save yet."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._undo.callback(os.close, self._write)  # the thread reads the end of the pipe and ends
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._undo.callback(signal.signal, signal.SIGTERM, handler)
        wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, wakeup)
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _watch(self) -> None:
        try:
            self._sigterm_within(None)
            self.asked.set()
            first, again = time.monotonic(), True
            while again and time.monotonic() - first <= _ECHO_SECONDS:
                again = self._sigterm_within(max(0.0, first + self._grace - time.monotonic()))
        except EOFError:
            return
        _end_process(
            "a second SIGTERM" if again else f"run.grace_seconds ({self._grace:g} s) are over"
        )

    def _sigterm_within(self, seconds: float | None) -> bool:
        """Return whether a SIGTERM came in time. Other signals (Ctrl-C) use the pipe too.

        Raises:
            EOFError: the context was closed.
        """
        while select.select([self._read], [], [], seconds)[0]:
            number = os.read(self._read, 1)
            if not number:
                os.close(self._read)
                raise EOFError
            if signal.SIGTERM in number:
                return True
        return False


def _end_process(why: str) -> None:
    line = f"{why}: left at once; committed checkpoints are kept"
    if logs.as_json():
        logs.write(line, "error", sys.stderr)
    else:
        print(f"cnsdiff: {line}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(TryAgain.exit_code)
