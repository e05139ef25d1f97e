"""The exceptions a user is meant to see, and how they are shown."""

import os
import sys
from collections.abc import Callable
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
        super().__init__(one_line(line))


class TryAgain(UserError):
    """Nothing is wrong with the job: it was preempted, a peer was lost, a host does not answer.

    The same command, run again, goes on. The code is EX_TEMPFAIL of sysexits.h.
    """

    exit_code = 75


def one_line(text: str, length: int = _LENGTH) -> str:
    """Without line ends or terminal codes, and of bounded length: it may come from a file."""
    line = "".join(mark if mark.isprintable() else "?" for mark in " ".join(text.split()))
    return line if len(line) <= length else f"{line[: length - 2]} .."


def exit_code_of(run: Callable[[], None], **fields: Any) -> int:
    """0; or what went wrong is shown, with ``fields`` in the JSON form, and this is its code."""
    try:
        run()
    except UserError as error:
        complain(str(error), **fields)
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted; what was committed is kept", **fields)
        return 130
    return 0


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
