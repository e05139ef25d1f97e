"""Make a changed checkpoint pass for a committed one, as an attacker would."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cnsdiff_dist.checkpoint.commit import digest_of


def seal(checkpoint: Path, record: dict[str, Any] | None = None) -> None:
    """Write a commit.json that fits the present files; ``record`` replaces its other content."""
    record = record or json.loads((checkpoint / "commit.json").read_text())
    record.pop("digest", None)
    contents = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    record["files"] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
        if name != "commit.json"
    }
    (checkpoint / "commit.json").write_text(json.dumps({**record, "digest": digest_of(record)}))
