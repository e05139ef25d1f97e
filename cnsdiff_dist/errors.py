"""The exceptions that a user is meant to see, and how they are shown."""

import os
import sys
from collections.abc import Callable
from typing import Any

from cnsdiff_dist import logs

_MAX_LENGTH = 1000


class UserError(Exception):
    """One line that says what is wrong, where (file, row, key) and what to do.

    The command line prints it and exits with ``exit_code``. Any other exception that escapes is a
    bug. The line may quote a hostile file, so it is made a single line of bounded length.
    """

    exit_code = 2

    def __init__(self, line: str) -> None:
        super().__init__(one_line(line))


class TryAgain(UserError):
    """A failure that is not the job's: a preemption, a lost peer, a host that does not answer.

    The same command, run again, continues. The exit code is EX_TEMPFAIL of sysexits.h.
    """

    exit_code = 75


def one_line(text: str, length: int = _MAX_LENGTH) -> str:
    """Return text of unknown origin without line ends and terminal codes, cut to ``length``."""
    line = "".join(mark if mark.isprintable() else "?" for mark in " ".join(text.split()))
    return line if len(line) <= length else f"{line[: length - 2]} .."


def exit_code_of(run: Callable[[], None], **fields: Any) -> int:
    """Call ``run``, show what went wrong and return the exit code, 0 for success.

    ``fields`` go into the JSON line of an error.
    """
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
    """Print an error on stderr as one line.

    The text form names the rank if there are several; the JSON form has ``fields``.
    """
    line = " ".join(line.split())
    if logs.as_json():
        logs.write(line, "error", sys.stderr, **fields)
        return
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = f" [rank {rank}]" if int(size) > 1 else ""
    print(f"cnsdiff: error{where}: {line}", file=sys.stderr)
