"""What the adversarial tests share: limits of cases and time, a worker process, a run to attack."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.inference.trained_model import open_trained
from cnsdiff_dist.runs.directory import check_dataset
from cnsdiff_dist.runs.opened import OpenRun
from cnsdiff_dist.training.loop import Progress, Trainer
from tests.support.hostile_datasets import REFUSED, outcome
from tests.support.small import small_config

ROOT = Path(__file__).parents[2]


def cases(count: int) -> settings:
    """So many cases, the same in every run, and no search for a smaller one."""
    # A smaller seed is no simpler case, so nothing is shrunk. All cases share their fixtures.
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=quiet,
    )


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the code inside when it takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    # The alarm repeats, because Python drops what is raised while it collects garbage.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def worker(*words: object, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """Run tests/support/hostile_datasets.py as a process."""
    command = [sys.executable, "-m", "tests.support.hostile_datasets", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def verdicts_of(dataset: str, kind: str, count: int) -> dict[int, str]:
    """What became of each case. They run in a process of their own, because Arrow can abort it."""
    done = worker(dataset, kind, 0, count)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"died at {last}: {done.stderr[-300:]}"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == count
    return dict(lines)


PARTS = ["train", "valid_ood", "users"]


@contextmanager
def replaced_content(path: Path, content: bytes) -> Iterator[None]:
    """Give a file another content, and the old one again at the end."""
    clean = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(clean)


QUICK: dict[str, Any] = {
    "train": {"epochs": 1},
    "checkpoint": {"keep": 9},
    "negatives": {"kind": "uniform"},
    "model": {"dim": 16, "layers": 0},
}


def _check_progress(progress: Progress) -> None:
    """Refuse a value of another type, which would cause a traceback some steps later."""
    for name, value in asdict(progress).items():
        kinds: Any = float if name in ("best", "best_alpha") else int
        if name == "first_loss":
            kinds = float | None
        assert isinstance(value, kinds) and not isinstance(value, bool), f"{name}: {value!r}"
        assert kinds is not int or 0 <= value < 2**63, f"{name}: {value!r}"


class Victim:
    """A copy of a run, which ``restore`` puts back before each attack.

    Attributes:
        best, resumed: what ``open`` and ``resume`` return while nothing is changed.
    """

    def __init__(self, clean: Path, folder: Path, dataset: str, world: World) -> None:
        self._clean, self.folder = clean, folder
        self._config, self._world = small_config(dataset, folder, **QUICK), world
        self._manifest = load_manifest(dataset)
        self._refusing: Trainer | None = None
        self.restore()
        self.best = self.open()
        self.resumed = self.resume()

    def restore(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._clean, self.folder)
        return self.checkpoint

    @property
    def checkpoint(self) -> Path:
        return max((self.folder / "checkpoints").glob("step-*"))

    def open(self) -> Any:
        found = outcome(lambda: open_trained(str(self.folder), None))
        return found if found == REFUSED else found.user_RD.tolist()

    def refuses(self) -> bool:
        """Return whether a training refuses to go on, asking the same trainer again and again.

        A trainer takes much longer to make than to refuse. One that has loaded something may show
        it later, so what ``resume`` returns is of a new one.
        """
        self._refusing = self._refusing or self._new_trainer()
        return bool(outcome(self._refusing.resume) == REFUSED)

    def _new_trainer(self) -> Trainer:
        return Trainer(OpenRun(self._config, self._manifest, self._world))

    def resume(self) -> Any:
        trainer = self._new_trainer()
        if outcome(trainer.resume) == REFUSED:
            return REFUSED
        _check_progress(trainer.progress)
        users = trainer.step.state()["tables"]["weights"]["user"]
        return [shard.tensor.tolist() for shard in users.local_shards()], trainer.progress.step

    def check_dataset(self) -> Any:
        return outcome(lambda: check_dataset(str(self.folder), self._manifest))
