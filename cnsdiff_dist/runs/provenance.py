"""The code, the packages and the machines that a run is trained with: its environment.json."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from cnsdiff_dist.distributed.world import World


def versions() -> dict[str, str]:
    """Return the installed versions of this package and of those that a result depends on."""
    names = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "pyarrow", "fsspec")
    found = {}
    for name in ("cnsdiff_dist", *names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(world: World) -> dict[str, Any]:
    """Return the content of environment.json."""
    return {
        "packages": versions(),
        "python": platform.python_version(),
        "git_revision": git_revision(),
        "world_size": world.size,
        "device": world.device.type,
    }


def git_revision() -> str | None:
    """Return the git commit of the running code, with ``+`` when tracked files differ from it.

    None if no git repository tracks the code.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside a repository of something else.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        revision = git("rev-parse", "HEAD")
        return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
