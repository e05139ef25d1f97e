"""Commands that people wait for at a prompt never import torch, which takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.small import write_config

# Runs at exit, after everything that the console script does.
_PROGRAM = """
import atexit, sys
atexit.register(lambda: print("imported:", "torch" in sys.modules))
from cnsdiff_dist.cli import entry
entry()
"""


def _run(*words: str) -> str:
    command = [sys.executable, "-c", _PROGRAM, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [[], ["train"], ["plan"], ["launch", "k8s"], ["status"]])
def test_help_does_not_import_torch(command: list[str]) -> None:
    said = _run(*command, "--help")
    assert said.startswith("usage: cnsdiff") and said.endswith("\nimported: False\n")


def test_status_does_not_import_torch(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", "data", tmp_path, negatives={"kind": "dns"})
    for words in ([], ["--json"]):
        said = _run("status", str(tmp_path), *words)
        assert "dns negatives" in said and said.endswith("\nimported: False\n")
