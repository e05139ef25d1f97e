"""What says that a checkpoint is committed, and what of it: read without torch, which takes seconds
to import."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cnsdiff_dist import storage
from cnsdiff_dist.data.schema import Count

COMMIT, DAMAGED, METADATA = "commit.json", "damaged.json", ".metadata"
NAME = re.compile(r"^step-([0-9]{8,15})\Z")

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass
class Progress:
    """Where a training is: all that resuming needs besides the tensors.

    ``skipped`` counts steps left out for not being finite, ``first_loss`` is the first mean that
    was logged; ``row_order`` is that of the plan that led here, 0 before versions said so.
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
        """JSON has no infinity: before the first evaluation ``best`` is left to its default."""
        return {key: value for key, value in asdict(self).items() if value != -math.inf}


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: Count
    sha256: str


class Record(BaseModel):
    """What a commit.json holds at least. ``time`` (Unix seconds) is that of the commit, and
    ``write_seconds`` what came before it; older versions wrote neither."""

    model_config = ConfigDict(strict=True)

    progress: Progress = Progress()
    time: Finite | None = None
    write_seconds: Finite | None = None
    files: dict[Annotated[str, Field(pattern=r"^(\.metadata|__\d{1,9}_\d{1,9}\.distcp)$")], _File]
    digest: str

    @property
    def bytes(self) -> int:
        """Of all ranks."""
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint: its global step, its URL, and the JSON written with it."""

    step: int
    url: str
    record: dict[str, Any]

    @property
    def checked(self) -> Record:
        """Of a commit whose :func:`record_damage` is None."""
        # From JSON again: only there does pydantic's strictness let a dataclass be a mapping.
        return Record.model_validate_json(json.dumps(self.record))

    @property
    def progress(self) -> Progress:
        return self.checked.progress


def files_of(url: str) -> list[str]:
    """What lies in checkpoints/, relative; not through a link, which would lead out of the run."""
    found = storage.list_files(url)
    links = {
        name
        for name in {path.partition("/")[0] for path in found}
        if storage.is_link(f"{url}/{name}")
    }
    return [path for path in found if path.partition("/")[0] not in links]


def committed_names(files: list[str]) -> list[str]:
    """The names of committed checkpoints among files relative to checkpoints/, oldest first."""
    names = [name for name, _, file in (path.partition("/") for path in files) if file == COMMIT]
    return sorted(filter(NAME.match, names), key=step_of)


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def read_commit(url: str) -> dict[str, Any]:
    """The JSON of a commit, or nothing where it is damaged: :func:`record_damage` says so."""
    try:
        record = json.loads(storage.read_bytes(f"{url}/{COMMIT}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def digest_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def record_damage(commit: Commit) -> str | None:
    """What is wrong with a commit.json itself, in words; None if it is what was written."""
    record = {key: value for key, value in commit.record.items() if key != "digest"}
    if not record or digest_of(record) != commit.record.get("digest"):
        return f"{COMMIT} is not what was written"
    try:
        files = commit.checked.files
    except ValidationError as error:
        first = error.errors()[0]
        return f"{COMMIT}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None if METADATA in files else f"{COMMIT} lists no {METADATA}"
