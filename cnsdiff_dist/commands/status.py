"""``cnsdiff status``: say how a run is doing.

The command never imports torch, which takes seconds: people watch a run with it.
"""

import argparse
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cnsdiff_dist.commands.options import add_command, add_run
from cnsdiff_dist.errors import one_line

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers

_EPILOG = """\
examples:
  cnsdiff status runs/demo
  cnsdiff status s3://bucket/runs/first --json
  watch -n 10 cnsdiff status runs/demo

On an object store the numbers are as old as the last evaluation or checkpoint.
"""


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "status",
        run,
        help="say how a run is doing, also while it is trained",
        description="How far a run is, when it last gave a sign of life, its numbers, its best "
        "evaluation and its checkpoints; from its directory alone, local or remote. Checkpoints "
        "are listed, not verified: training and evaluating do that.",
        epilog=_EPILOG,
    )
    add_run(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist.runs.status import read_status

    status = read_status(args.run_url)
    if args.json:
        print(json.dumps(status, indent=2))
    else:
        _print(_rows(status))


def _print(rows: list[tuple[str, str]]) -> None:
    """Print plain lines, or a table on a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        for name, value in rows:
            print(f"{name:18} {value}".rstrip())
        return
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)


def _rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines to print, as (name, value)."""
    rows = [("run", status["run"])]
    if status["as_of"] is not None:
        when = f"{_time(status['as_of'])}; evaluations and checkpoints bring newer numbers"
        rows.append(("as of", when))
    rows += [
        ("dataset", _known(status["dataset"])),
        ("method", status["method"]),
        ("ranks", f"{_known(status['ranks'])} on {_known(status['device'])}"),
        ("progress", _progress(status)),
        ("state", _state(status)),
    ]
    rows += [(name, text) for name, text in _numbers(status) if text]
    if best := status["best"]:
        value = f"{best['split']} {best['metric']} {best['value']:.4f} at step {best['step']:,}"
        rows.append(("best evaluation", f"{value}; {best['evaluations_since']} since"))
    rows += [("checkpoint", _checkpoint(entry)) for entry in status["checkpoints"]]
    if not status["checkpoints"]:
        rows.append(("checkpoint", "none committed yet"))
    damaged = [(entry["step"], str(entry["damage"])) for entry in status["damaged"]]
    return rows + [("damaged", f"step {step:,}: {one_line(why, 300)}") for step, why in damaged]


def _progress(status: dict[str, Any]) -> str:
    step, total, epoch = status["step"], status["total_steps"], status["epoch"]
    if total:
        text = f"step {step:,} of {total:,.0f} ({100 * min(1.0, step / total):.0f} %)"
    else:
        text = f"step {step:,}" if step else "no step logged yet"
    return text if epoch is None else f"{text}, epoch {epoch}"


def _state(status: dict[str, Any]) -> str:
    from cnsdiff_dist.runs.status import ago

    sign = status["last_sign_of_life"]
    seen = f"last sign of life {_duration(ago(sign['time']))} ago ({sign['what']})" if sign else ""
    if status["finished"]:
        return f"finished: {status['finished']}; {seen}"
    return f"not finished; {seen}" if seen else "not finished; no sign of life yet"


def _numbers(status: dict[str, Any]) -> list[tuple[str, str]]:
    def shown(name: str, form: str, factor: float = 1.0) -> str:
        value = status[name]
        return "" if value is None else form.format(factor * value)

    left = status["remaining_seconds"]
    return [
        ("loss", shown("loss", "{:.4f}")),
        ("throughput", shown("samples_per_second", "{:,.0f} samples/s")),
        ("goodput", shown("goodput", "{:.0f} %", 100)),
        ("data wait", shown("data_wait_ratio", "{:.1f} % of the time", 100)),
        ("memory", shown("memory_gib", "{:.2f} GiB a rank at most")),
        ("remaining", "" if left is None else f"{_duration(left)} at this pace"),
        ("retries", shown("read_retries", "{:,.0f}") if status["read_retries"] else ""),
        ("skipped steps", shown("skipped_steps", "{:,.0f}") if status["skipped_steps"] else ""),
    ]


def _checkpoint(entry: dict[str, Any]) -> str:
    from cnsdiff_dist.runs.status import ago

    age = "" if entry["time"] is None else f", {_duration(ago(entry['time']))} ago"
    size = f"{entry['bytes'] / 2**20:,.1f} MiB"
    return f"step {entry['step']:,}{age}, {size}{' (best)' if entry['best'] else ''}"


def _known(value: Any) -> str:
    return "unknown" if value is None else one_line(str(value), 300)


def _time(when: float) -> str:
    try:
        return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # a year that no calendar has
        return f"second {when:.0f}"


def _duration(seconds: float) -> str:
    """The duration in at most two units, such as ``2 h 5 min``."""
    whole = int(seconds)
    for name, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {smaller}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
