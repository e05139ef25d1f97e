"""Reports a training: to metrics.jsonl, TensorBoard, Prometheus and the screen. Rank 0 only."""

import json
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from cnsdiff_dist import logs, storage
from cnsdiff_dist.checkpoint.commit import Commit
from cnsdiff_dist.runs.prometheus import MetricsServer


class Screen:
    """Shows a progress bar on a terminal, and plain lines elsewhere.

    Args:
        columns: what follows the bar and its count.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        self._console = Console()
        self._has_bar = self._console.is_terminal and not logs.as_json()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
            console=self._console,
            disable=not self._has_bar,
        )

    def say(self, line: str, level: str = "info", fields: dict[str, Any] | None = None) -> None:
        """Print a line. Only lines of JSON show the level and the fields, see ``logs.py``."""
        if logs.as_json():
            logs.write(line, level, **(fields or {}))
        else:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


class Reporter(Screen):
    """Reports a training while it is entered.

    It writes to the run directory or, if that is remote, to a temporary directory that
    :meth:`publish` uploads.

    Args:
        run_url: the run directory.
        step: the global step that the run resumes from. Lines of later steps are dropped, because
            they will be written again.
        total_steps: the steps of the whole training.
        metrics_server: gets everything that is reported.
    """

    def __init__(
        self, run_url: str, step: int, total_steps: int, metrics_server: MetricsServer | None = None
    ) -> None:
        self._url, self._remote = run_url, not storage.is_local(run_url)
        self._dir = Path(tempfile.mkdtemp()) if self._remote else storage.local_path(run_url)
        self._drop_lines_after(step)
        with storage.explained(run_url, "write"):
            self._lines = (self._dir / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self._dir / "tensorboard"), purge_step=step + 1)
        super().__init__(
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(elapsed_when_finished=True)
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=step, note="")
        self._total, self._started, self._first_step = total_steps, time.monotonic(), step
        self._server = metrics_server or MetricsServer()
        self._server.at(step, total_steps)

    def _drop_lines_after(self, step: int) -> None:
        name = f"{self._url}/metrics.jsonl"
        if not storage.exists(name):
            return
        lines = storage.read_text(name).splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        storage.write_text(str(self._dir / "metrics.jsonl"), "".join(f"{line}\n" for line in kept))

    def advance(self) -> None:
        """Count a step."""
        self._bar.advance(self._task)
        self._server.advance()

    def log(
        self, step: int, epoch: int, values: dict[str, float], commit: Commit | None = None
    ) -> None:
        """Report the ``values`` of the steps since the last call.

        ``commit`` is the newest checkpoint, None if there is none.
        """
        self._write(step, epoch, "train", values, total_steps=self._total)
        self._server.log(epoch, values)
        if commit:
            self.committed(commit)
        note = "every step left out: not finite"
        if "loss" in values:
            note = f"loss {values['loss']:.4f}  {values['samples_per_second']:,.0f} samples/s"
        self._bar.update(self._task, note=note)
        if not self._has_bar:
            fields = {**_head(step, epoch, "train"), "total_steps": self._total, **values}
            text = f"epoch {epoch}  step {step}/{self._total}  {note}"
            self.say(f"{text}  at most {self._time_left(step)} left", fields=fields)

    def _time_left(self, step: int) -> str:
        pace = (time.monotonic() - self._started) / max(step - self._first_step, 1)
        minutes, seconds = divmod(int(pace * (self._total - step)), 60)
        return f"{minutes}:{seconds:02d}"

    def committed(self, commit: Commit) -> None:
        """Report the newest checkpoint."""
        self._server.committed(commit)

    def evaluation(self, step: int, epoch: int, result: dict[str, Any], best: bool) -> None:
        """Report an evaluation; ``best`` says whether it is the best one so far."""
        split, metrics = result["split"], result["metrics"]
        self._write(step, epoch, split, metrics)
        self._server.evaluation(split, metrics)
        shown = "  ".join(
            f"{key} {metrics[key]:.4f}" for key in metrics if key.startswith(("recall", "ndcg"))
        )
        shown += f"  alpha {metrics['alpha']:g}"
        self.say(
            f"epoch {epoch}  step {step}  {split}: {shown}{'  (best)' if best else ''}",
            fields={**_head(step, epoch, split), "best": best, **metrics},
        )

    def _write(
        self, step: int, epoch: int, kind: str, values: dict[str, float], **more: int
    ) -> None:
        """Write a line of metrics.jsonl. Of its numbers only ``values`` go to TensorBoard."""
        record = {**_head(step, epoch, kind), "time": time.time(), **more, **values}
        with storage.explained(self._url, "write"):
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
            for key, value in values.items():
                self._board.add_scalar(f"{kind}/{key}", value, step)

    def publish(self) -> None:
        """Make everything reported so far durable at the run's URL."""
        with storage.explained(self._url, "write"):
            self._board.flush()
        if self._remote:
            for path in sorted(self._dir.rglob("*")):
                if path.is_file():
                    storage.upload(path, f"{self._url}/{path.relative_to(self._dir)}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._lines.close()
        self._board.close()
        if self._remote:
            shutil.rmtree(self._dir, ignore_errors=True)


def _head(step: int, epoch: int, kind: str) -> dict[str, Any]:
    return {"step": step, "epoch": epoch, "kind": kind}


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for the torn last line of a run that was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
