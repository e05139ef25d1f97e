"""What a run says: metrics.jsonl, TensorBoard, Prometheus, a bar or lines. Rank 0 only."""

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
from cnsdiff_dist.runs.prometheus import Exporter


class Screen:
    """A bar on a terminal, lines elsewhere; ``columns`` follow the bar and its count."""

    def __init__(self, *columns: ProgressColumn) -> None:
        self._console = Console()
        self._has_bar = self._console.is_terminal and not logs.as_json()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns,
            console=self._console, disable=not self._has_bar,
        )  # fmt: skip

    def say(self, line: str, level: str = "info", fields: dict[str, Any] | None = None) -> None:
        """``level`` and ``fields`` are for lines of JSON alone (:mod:`cnsdiff_dist.logs`)."""
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
    """Writes to a local directory, the run's own or a temporary one that is uploaded.

    Args:
        run_url: the run directory.
        step: the global step the run resumes from; later lines are dropped, they will
            be written again.
        total_steps: steps of the whole training.
        exporter: is told all that is said here.
    """

    def __init__(
        self, run_url: str, step: int, total_steps: int, exporter: Exporter | None = None
    ) -> None:
        self._url, self._remote = run_url, not storage.is_local(run_url)
        self._dir = Path(tempfile.mkdtemp()) if self._remote else storage.local_path(run_url)
        self._keep_until(step)
        with storage.explained(run_url, "write"):
            self._metrics = (self._dir / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self._dir / "tensorboard"), purge_step=step + 1)
        super().__init__(
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(elapsed_when_finished=True)
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=step, note="")
        self._total, self._started, self._first_step = total_steps, time.monotonic(), step
        self._exporter = exporter or Exporter()
        self._exporter.at(step, total_steps)

    def _keep_until(self, step: int) -> None:
        name = f"{self._url}/metrics.jsonl"
        if not storage.exists(name):
            return
        lines = storage.read_text(name).splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        storage.write_text(str(self._dir / "metrics.jsonl"), "".join(f"{line}\n" for line in kept))

    def advance(self) -> None:
        self._bar.advance(self._task)
        self._exporter.advance()

    def log(
        self, step: int, epoch: int, values: dict[str, float], commit: Commit | None = None
    ) -> None:
        """One line of metrics.jsonl, the same values in TensorBoard and on the screen; ``commit``
        is the newest checkpoint, if there is one."""
        self._write(step, epoch, "train", values, total_steps=self._total)
        self._exporter.log(epoch, values)
        if commit:
            self.committed(commit)
        note = "every step left out: not finite"
        if "loss" in values:
            note = f"loss {values['loss']:.4f}  {values['samples_per_second']:,.0f} samples/s"
        self._bar.update(self._task, note=note)
        if not self._has_bar:
            pace = (time.monotonic() - self._started) / max(step - self._first_step, 1)
            minutes, seconds = divmod(int(pace * (self._total - step)), 60)
            self.say(
                f"epoch {epoch}  step {step}/{self._total}  {note}  "
                f"at most {minutes}:{seconds:02d} left",
                fields={**_where(step, epoch, "train"), "total_steps": self._total, **values},
            )

    def committed(self, commit: Commit) -> None:
        self._exporter.committed(commit)

    def evaluation(self, step: int, epoch: int, result: dict[str, Any], best: bool) -> None:
        split, metrics = result["split"], result["metrics"]
        self._write(step, epoch, split, metrics)
        self._exporter.evaluation(split, metrics)
        shown = "  ".join(
            f"{key} {metrics[key]:.4f}" for key in metrics if key.startswith(("recall", "ndcg"))
        )
        shown += f"  alpha {metrics['alpha']:g}"
        self.say(
            f"epoch {epoch}  step {step}  {split}: {shown}{'  (best)' if best else ''}",
            fields={**_where(step, epoch, split), "best": best, **metrics},
        )

    def _write(
        self, step: int, epoch: int, kind: str, values: dict[str, float], **more: int
    ) -> None:
        """``more`` is no curve, and not for TensorBoard."""
        record = {**_where(step, epoch, kind), "time": time.time(), **more, **values}
        with storage.explained(self._url, "write"):
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
            for key, value in values.items():
                self._board.add_scalar(f"{kind}/{key}", value, step)

    def publish(self) -> None:
        """Make what was logged so far durable at the run's URL."""
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
        self._metrics.close()
        self._board.close()
        if self._remote:
            shutil.rmtree(self._dir, ignore_errors=True)


def _where(step: int, epoch: int, kind: str) -> dict[str, Any]:
    return {"step": step, "epoch": epoch, "kind": kind}


def _step_of(line: str) -> float:
    """The step of a line; a torn last line of a killed run belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
