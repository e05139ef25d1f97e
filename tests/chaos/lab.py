"""Where scenarios run: the dataset, their folders, and the calm runs they are compared with."""

import random
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.invariants import Calm, calm_of
from tests.chaos.job import ROOT, Job
from tests.chaos.store import LocalRun, Run

TIMEOUT_SECONDS = 20  # run.timeout_seconds: how long ranks wait for a peer that hangs
RETRY_SECONDS = 15  # run.retry_seconds: how long they wait for a store


@dataclass
class Lab:
    """What all scenarios of one call share.

    Attributes:
        kills: how often a rank is killed at random; other scenarios have a few faults each.
        exports: compare what `cnsdiff export` writes as well.
    """

    folder: Path
    rng: random.Random
    kills: int
    exports: bool = False
    _calm: dict[int, Calm] = field(default_factory=dict)

    @property
    def dataset(self) -> Path:
        """The dataset, which `cnsdiff prepare` makes on first use."""
        path = self.folder / "data"
        if not (path / "manifest.json").exists():
            words = ["prepare", str(path), "--synthetic", "--users", "700", "--items", "250"]
            command = [sys.executable, "-m", "cnsdiff_dist", *words]
            done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
        return path

    def job(self, name: str, run: Run, epochs: int, data_url: str = "", **options: Any) -> Job:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        tree = self._config(data_url or str(self.dataset), run.url, epochs)
        config.write_text(yaml.safe_dump(tree))
        return Job(folder, config, run, **options)

    def _config(self, data_url: str, run_url: str, epochs: int) -> dict[str, Any]:
        return {
            "model": {"dim": 16},
            "generator": {"hidden": 32},
            # Another world size rounds sums differently, so that a vector just at the margin may be
            # left out or not: seen once in 11 runs of 144 steps, a distance of 2e-3 in the end.
            "negatives": {"margin": None},
            "data": {"url": data_url, "block_rows": 300},
            # With a line for each step, the losses show that every step is that of the calm run.
            "train": {"epochs": epochs, "batch": 512, "log_every": 1, "patience": 1_000_000},
            "checkpoint": {"every_steps": 5, "keep": 5},
            "run": {
                "dir": run_url,
                "timeout_seconds": TIMEOUT_SECONDS,
                "retry_seconds": RETRY_SECONDS,
            },
        }

    def calm(self, epochs: int) -> Calm:
        """The undisturbed run of so many epochs, which is trained on first use."""
        if epochs not in self._calm:
            name = f"calm-{epochs}"
            with ExitStack() as stack:
                job = self.job(name, LocalRun(self.folder / name / "run"), epochs)
                stack.callback(job.stop)
                job.start()
                job.finish()
                self._calm[epochs] = calm_of(job, self.exports)
        return self._calm[epochs]
