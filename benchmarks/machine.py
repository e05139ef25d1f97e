"""What every benchmark shares: the machine in its JSON, and how calls are timed."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine(threads: int = 1, ranks: int = 1) -> dict[str, Any]:
    """The machine and the versions that a figure was measured with."""
    models = _values("/proc/cpuinfo", "model name")
    kilobytes = int(_values("/proc/meminfo", "MemTotal")[0].split()[0])
    return {
        "cpu": f"{models[0] if models else platform.machine()} x {len(models)}",
        "memory_gib": round(kilobytes / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": ranks,
        "threads_per_rank": threads,
    }


def _values(path: str, name: str) -> list[str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith(name)]


def alternated(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call. They take turns, so that all meet the same load of the machine; a first
    round is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if index:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """The median over rounds of the time of call ``over`` divided by that of ``under``."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def report(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))
