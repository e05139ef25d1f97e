"""A thread that notes the first steps and the commits of a run by the clock of this process."""

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.store import Run, Seen

# A process must continue from what was committed this many seconds before its first step. A newer
# commit may have come after the process looked; starting up takes longer than this.
_SETTLED = 2.0


@dataclass(frozen=True)
class Line:
    """A step that one rank trained."""

    attempt: str
    rank: int
    size: int
    epoch: int
    step: int
    hashes: dict[str, str]


def read_trace(path: Path) -> list[Line]:
    """The whole lines of one process's trace."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [Line(**json.loads(line)) for line in whole.splitlines()]


class Watcher:
    def __init__(self, trace: Path, run: Run) -> None:
        self._trace, self._run = trace, run
        self.started: dict[str, float] = {}  # attempt -> when its first step was seen
        self.commits: dict[Seen, float] = {}
        self.damaged: set[Seen] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(self._run.interval):
            self.look_once()

    def look_once(self) -> None:
        now = time.monotonic()
        for commit in self._run.commits():
            self.commits.setdefault(commit, now)
        now = time.monotonic()
        for path in self._trace.iterdir():
            if path.stem not in self.started and path.stat().st_size:
                self.started.setdefault(path.stem, now)

    def attempts(self) -> set[str]:
        return set(self.started)

    def world_size(self) -> int:
        """The world size of the process that began last; 0 before the first step."""
        newest = max(self.started, key=lambda attempt: self.started[attempt], default=None)
        return read_trace(self._trace / f"{newest}.jsonl")[0].size if newest else 0

    def traced_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._trace.iterdir())

    def lines(self) -> dict[str, list[Line]]:
        """The steps of every process, in the order in which the processes began."""
        order = sorted(self.started, key=lambda attempt: self.started[attempt])
        return {attempt: read_trace(self._trace / f"{attempt}.jsonl") for attempt in order}

    def newest_commit(self, attempt: str) -> int:
        """The least step from which a process should have continued."""
        limit = self.started[attempt] - _SETTLED
        known = list(self.commits.items())
        return max((c.step for c, at in known if at < limit and c not in self.damaged), default=0)

    def damage(self, step: int) -> None:
        """Stop counting the present commits of a step."""
        self.damaged |= {commit for commit in list(self.commits) if commit.step == step}

    def committed_steps(self) -> set[int]:
        return {commit.step for commit in list(self.commits)}

    def stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=20)
