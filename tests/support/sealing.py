"""Make a changed checkpoint pass for a committed one, as whoever wants to do harm would."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cnsdiff_dist.checkpoint.commit import digest_of


def seal(checkpoint: Path, record: dict[str, Any] | None = None) -> None:
    """Write a commit.json that fits the files as they are; ``record`` replaces its content."""
    record = record or json.loads((checkpoint / "commit.json").read_text())
    record.pop("digest", None)
    record["files"] = {
        path.name: {
            "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint.iterdir()
        if path.name != "commit.json"
    }  # fmt: skip
    (checkpoint / "commit.json").write_text(json.dumps({**record, "digest": digest_of(record)}))
