"""The lines that this program prints: text for people or, with CNSDIFF_LOG_FORMAT=json, one JSON
object each for a machine that collects them."""

import json
import logging
import math
import os
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

VARIABLE = "CNSDIFF_LOG_FORMAT"
FORMATS = ("text", "json")


class Context:
    """Where this process is, for every line: the run as it may be shown, and the global step."""

    run: str | None = None
    step: int | None = None


context = Context()


def chosen() -> str:
    """What the environment asks for; it may be none of :data:`FORMATS`."""
    return os.environ.get(VARIABLE) or "text"


def as_json() -> bool:
    return chosen() == "json"


def write(message: str, level: str = "info", stream: TextIO | None = None, **fields: Any) -> None:
    """One JSON object on a line; ``fields`` go before what the context says. What is no finite
    number is null there: JSON has no other way to say it."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    record = {
        "time": now, "level": level, "rank": int(os.environ.get("RANK", "0")),
        "run": context.run, "step": context.step,
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), "message": message,
        **{key: _plain(value) for key, value in fields.items()},
    }  # fmt: skip
    stream = stream or sys.stdout
    stream.write(json.dumps(record) + "\n")  # in one piece: the ranks of a node share a pipe
    stream.flush()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def take_over() -> None:
    """From now on what libraries log, and the traceback of a bug, are JSON lines as well."""
    logging.getLogger().addHandler(_Handler())
    sys.excepthook = _bug


_FORMATTER = logging.Formatter()


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            more = (
                {"traceback": _FORMATTER.formatException(record.exc_info)}
                if record.exc_info
                else {}
            )
            level = record.levelname.lower()
            write(record.getMessage(), level, sys.stderr, logger=record.name, **more)
        except Exception:  # a library's malformed line is not the training's end
            self.handleError(record)


def _bug(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    import traceback as printing

    text = "".join(printing.format_exception(kind, error, traceback))
    write(f"{kind.__name__}: {error}", "critical", sys.stderr, traceback=text)
