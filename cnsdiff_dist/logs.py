"""The lines that this program prints.

They are text for people or, with CNSDIFF_LOG_FORMAT=json, JSON lines for a log collector: one
object each.
"""

import json
import logging
import math
import os
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

VARIABLE = "CNSDIFF_LOG_FORMAT"
FORMATS = ("text", "json")

_FORMATTER = logging.Formatter()


class Context:
    """What every JSON line says of this process: the run's URL without secrets, the global step."""

    run: str | None = None
    step: int | None = None


context = Context()


def chosen() -> str:
    """Return the format that the environment asks for, which may not be one of :data:`FORMATS`."""
    return os.environ.get(VARIABLE) or "text"


def as_json() -> bool:
    return chosen() == "json"


def write(message: str, level: str = "info", stream: TextIO | None = None, **fields: Any) -> None:
    """Write one JSON line to ``stream``, by default stdout.

    ``fields`` override the keys that every line has. NaN and the infinities become null, because
    JSON has no numbers for them.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    record = {
        "time": now,
        "level": level,
        "rank": int(os.environ.get("RANK", "0")),
        "run": context.run,
        "step": context.step,
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "message": message,
        **{key: _finite(value) for key, value in fields.items()},
    }
    stream = stream or sys.stdout
    stream.write(json.dumps(record) + "\n")  # one call: the ranks of a node share a pipe
    stream.flush()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def take_over() -> None:
    """Make JSON lines also of what libraries log and of the traceback of a bug."""
    logging.getLogger().addHandler(_JsonHandler())
    sys.excepthook = _write_bug


class _JsonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {"logger": record.name}
            if record.exc_info:
                fields["traceback"] = _FORMATTER.formatException(record.exc_info)
            write(record.getMessage(), record.levelname.lower(), sys.stderr, **fields)
        except Exception:  # a malformed record of a library must not end the training
            self.handleError(record)


def _write_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    write(f"{kind.__name__}: {error}", "critical", sys.stderr, traceback=text)
