"""A rank ends with the torchrun agent that started it. Nothing here imports torch."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def end_with_the_agent() -> None:
    """Have the kernel kill this rank when torchrun's agent dies; elsewhere do nothing.

    An agent that is killed cannot end its ranks, and they would train on without it. Call this
    first of all: a rank whose agent dies before is not killed, and torch takes seconds to import.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "prctl"):
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
