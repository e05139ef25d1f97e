"""Write the lock files of this folder from pyproject.toml: ``make lock``.

pip resolves and reports without installing (``--dry-run --report``; a recent pip reads the
metadata alone and downloads no CUDA package). Pins are of Linux x86-64, CPython 3.11.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
HEADER = "# Written by requirements/lock.py (make lock) from pyproject.toml; do not edit.\n"
Pins = dict[str, str]


def resolve(requirements: list[str], constraints: Pins) -> tuple[Pins, list[dict[str, Any]]]:
    """The pins that satisfy ``requirements`` with all they need, and their metadata."""
    with tempfile.TemporaryDirectory() as folder:
        report, limits = Path(folder, "report.json"), Path(folder, "constraints.txt")
        limits.write_text(lines(constraints), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "-c", str(limits)]
        subprocess.run([*command, *requirements], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {normal(item["name"]): item["version"].split("+")[0] for item in found}, found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    return normal(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def lines(pins: Pins) -> str:
    return "".join(f"{name}=={pins[name]}\n" for name in sorted(pins))


def write(name: str, pins: Pins) -> None:
    (FOLDER / name).write_text(HEADER + lines(pins), encoding="utf-8")
    print(f"{name}: {len(pins)} packages")


def main() -> None:
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    direct, dev = project["dependencies"], project["optional-dependencies"]["dev"]
    cuda, metadata = resolve(direct, {})
    torchrec = next(item for item in metadata if normal(item["name"]) == "torchrec")
    direct += [need for need in torchrec["requires_dist"] if ";" not in need]
    # On a CPU: FBGEMM's CPU build, and torchrec without its metadata, which demands the CUDA one.
    direct = [need for need in direct if name_of(need) not in ("torchrec", "fbgemm-gpu")]
    direct += [f"fbgemm-gpu-cpu=={cuda['fbgemm-gpu']}"]
    cpu, _ = resolve(direct, cuda)
    tools, _ = resolve(dev, {**cuda, **cpu})
    write("cuda.txt", cuda)
    # torch is installed first, from its own line; what its CUDA build pulls is not for a CPU.
    write("cpu.txt", {name: cpu[name] for name in cpu if not is_cuda(name)})
    write("cpu-nodeps.txt", {"torchrec": cuda["torchrec"]})
    write("dev.txt", {name: tools[name] for name in tools if name not in cpu})


def is_cuda(name: str) -> bool:
    return name.startswith(("nvidia-", "cuda-")) or name == "triton"


if __name__ == "__main__":
    main()
