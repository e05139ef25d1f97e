"""Run directories seen from outside: which checkpoints are committed, and when."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.s3server import S3Server


@dataclass(frozen=True)
class Seen:
    """One writing of a step's commit.json; a step may be saved again."""

    step: int
    written: str


class LocalRun:
    interval = 0.02  # seconds between two looks

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def commits(self) -> list[Seen]:
        found = []
        for path in self.folder.glob("checkpoints/step-*/commit.json"):
            with suppress(FileNotFoundError):  # pruned meanwhile
                found.append(Seen(step_of(path.parent.name), str(path.stat().st_mtime_ns)))
        return found

    def unfinished(self) -> set[str]:
        """Names of the checkpoints that are there but not committed."""
        with suppress(FileNotFoundError):
            folders = list((self.folder / "checkpoints").glob("step-*"))
            return {path.name for path in folders if not (path / "commit.json").exists()}
        return set()

    def fetch(self, name: str, target: Path) -> Path:
        """A local copy of a file or folder of the run."""
        return self.folder / name


class BucketRun:
    interval = 0.5

    def __init__(self, server: S3Server, path: str) -> None:
        self.server, self.path, self.url = server, path, f"s3://{path}"
        self._fs: Any = None

    def commits(self) -> list[Seen]:
        self._fs = self._fs or self.server.filesystem()
        try:
            found = self._fs.find(f"{self.path}/checkpoints", detail=True)
        except Exception:  # the server is down, as it should be at times
            self._fs = None
            return []
        return [
            Seen(step_of(name.split("/")[-2]), str(entry["LastModified"]))
            for name, entry in found.items()
            if name.endswith("/commit.json")
        ]

    def fetch(self, name: str, target: Path) -> Path:
        fs, root = self.server.filesystem(), f"{self.path}/{name}"
        shutil.rmtree(target, ignore_errors=True)
        for source in [root] if fs.isfile(root) else fs.find(root):
            copy = target / source.removeprefix(root).strip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(source, str(copy))
        return target


Run = LocalRun | BucketRun


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def folder_of(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def distcp_files(checkpoint: Path) -> Iterator[Path]:
    yield from sorted(checkpoint.glob("*.distcp"))
