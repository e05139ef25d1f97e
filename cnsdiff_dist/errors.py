"""The exceptions a user is meant to see, and how they are shown."""

import os
import sys
from typing import Any

from cnsdiff_dist import logs

_LENGTH = 1000


class UserError(Exception):
    """What is wrong, where (file, row, key) and what to do, in one line.

    The command line prints it as it is and exits with its code; anything else that
    escapes is a bug. What it quotes may come from a file that means harm: it stays one line, of
    bounded length.
    """

    exit_code = 2

    def __init__(self, line: str) -> None:
        line = " ".join(line.split())
        line = "".join(mark if mark.isprintable() else "?" for mark in line)  # no terminal codes
        super().__init__(line if len(line) <= _LENGTH else f"{line[: _LENGTH - 2]} ..")


class TryAgain(UserError):
    """Nothing is wrong with the job: it was preempted, a peer was lost, a host does not answer.

    The same command, run again, goes on. The code is EX_TEMPFAIL of sysexits.h.
    """

    exit_code = 75


def complain(line: str, **fields: Any) -> None:
    """Show what went wrong, as one line that names the rank if there are several; ``fields`` are
    for the JSON form."""
    line = " ".join(line.split())
    if logs.as_json():
        logs.write(line, "error", sys.stderr, **fields)
        return
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = f" [rank {rank}]" if int(size) > 1 else ""
    print(f"cnsdiff: error{where}: {line}", file=sys.stderr)
