"""The container image, built and checked by launch/image.sh without docker."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_TOOLS = ("buildah", "debootstrap", "unshare")
_WHEELS = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL")


def _why_not() -> str | None:
    if os.geteuid():
        return "needs root"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    if not any(os.environ.get(name) for name in _WHEELS):
        return f"needs a CPU build of torch: set one of {', '.join(_WHEELS)}"
    return None


@pytest.mark.slow
@pytest.mark.timeout(1700)
@pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "")
def test_the_image_builds_and_runs_without_root(tmp_path: Path) -> None:
    command = [ROOT / "launch" / "image.sh", "check", "--bootstrap", "--store", tmp_path / "store"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    for said in ("checkpointed at step", "2 cpu ranks", "none there: tools", "all checks passed"):
        assert said in done.stdout, done.stdout[-5000:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("build",), "needs --store or --archive"),
        (("make",), "no such command"),
        (("build", "--lock", "tpu"), "--lock is cpu or cuda"),
        (("build", "--store"), "--store needs a value"),
    ],
)
@pytest.mark.skipif(bool(os.geteuid()), reason="needs root")
def test_wrong_words_are_one_line(words: tuple[str, ...], said: str) -> None:
    command = [ROOT / "launch" / "image.sh", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
