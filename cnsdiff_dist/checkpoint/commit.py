"""``commit.json``, which makes a directory of files a committed checkpoint: what it says.

``checkpoint/manager.py`` writes it, after all other files. Nothing here imports torch, which takes
seconds: `cnsdiff status` reads commits without it.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cnsdiff_dist import storage
from cnsdiff_dist.data.schema import Count

COMMIT, DAMAGED, METADATA = "commit.json", "damaged.json", ".metadata"
NAME = re.compile(r"^step-([0-9]{8,15})\Z")

Finite = Annotated[float, Field(allow_inf_nan=False)]
FileName = Annotated[str, Field(pattern=r"^(\.metadata|__\d{1,9}_\d{1,9}\.distcp)$")]


@dataclass
class Progress:
    """Where a training is: all that resuming needs besides the tensors.

    ``skipped`` counts the steps whose update was left out because it was not finite.
    ``first_loss`` is the first mean loss that was logged. ``row_order`` is the version of the
    epoch plan's row order that led here; it is 0 in checkpoints from before it was recorded.
    """

    step: Count = 0
    best: Finite = -math.inf
    best_step: Count = 0
    best_alpha: Finite = 0.0
    evaluations_since_best: Count = 0
    skipped: Count = 0
    first_loss: Finite | None = None
    row_order: Count = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON, without ``best`` before the first evaluation.

        It is -inf then, which JSON lacks and which is its default.
        """
        return {key: value for key, value in asdict(self).items() if value != -math.inf}


class _FileRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: Count
    sha256: str


class Record(BaseModel):
    """The keys of a commit.json that this program reads; it may hold more.

    ``time`` (Unix seconds) is when the checkpoint was committed and ``write_seconds`` is how long
    it took until then. Older versions wrote neither.
    """

    model_config = ConfigDict(strict=True)

    progress: Progress = Progress()
    time: Finite | None = None
    write_seconds: Finite | None = None
    files: dict[FileName, _FileRecord]
    digest: str

    @property
    def bytes(self) -> int:
        """The size of the files of all ranks."""
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint: its global step, its URL, and the content of its commit.json."""

    step: int
    url: str
    record: dict[str, Any]

    @property
    def checked(self) -> Record:
        """The validated record of a commit whose :func:`record_damage` is None."""
        # Pydantic's strict mode takes a mapping for a dataclass only when it parses JSON.
        return Record.model_validate_json(json.dumps(self.record))

    @property
    def progress(self) -> Progress:
        return self.checked.progress


def files_of(url: str) -> list[str]:
    """Return the files under checkpoints/, relative to it.

    Links are left out, because they could lead out of the run.
    """
    found = storage.list_files(url)
    folders = {path.partition("/")[0] for path in found}
    links = {name for name in folders if storage.is_link(f"{url}/{name}")}
    return [path for path in found if path.partition("/")[0] not in links]


def committed_names(files: list[str]) -> list[str]:
    """Return the names of the committed checkpoints among :func:`files_of`, oldest first."""
    names = [name for name, _, file in (path.partition("/") for path in files) if file == COMMIT]
    return sorted(filter(NAME.match, names), key=step_of)


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def read_commit(url: str) -> dict[str, Any]:
    """Return the content of a commit.json, empty if it is no JSON object.

    :func:`record_damage` calls an empty one damaged.
    """
    try:
        record = json.loads(storage.read_bytes(f"{url}/{COMMIT}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def digest_of(record: dict[str, Any]) -> str:
    """Return the sha256 of a commit.json without its key ``digest``, which holds this value."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def record_damage(commit: Commit) -> str | None:
    """Say what is wrong with the commit.json itself; None if it is what was written."""
    record = {key: value for key, value in commit.record.items() if key != "digest"}
    if not record or digest_of(record) != commit.record.get("digest"):
        return f"{COMMIT} is not what was written"
    try:
        files = commit.checked.files
    except ValidationError as error:
        first = error.errors()[0]
        return f"{COMMIT}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None if METADATA in files else f"{COMMIT} lists no {METADATA}"


def file_damage(commit: Commit, name: str) -> str | None:
    """Say what is wrong with one file of a checkpoint; None if it is what was committed.

    The whole file is read, which takes about 2 s per GB.
    """
    url, expected = storage.join(commit.url, name), commit.record["files"][name]
    if not storage.exists(url):
        return f"{name} is missing"
    with storage.explained(url, "read"):
        size, sha256 = storage.retrying(lambda: _size_and_sha256(url))
    if size != expected["bytes"]:
        return f"{name} has {size} bytes, not {expected['bytes']}"
    if sha256 != expected["sha256"]:
        return f"the sha256 of {name} is not the committed one"
    return None


def _size_and_sha256(url: str) -> tuple[int, str]:
    with storage.open_read(url) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return file.seek(0, os.SEEK_END), sha256
