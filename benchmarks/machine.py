"""What every benchmark's JSON says of the machine, and how it times."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine(threads: int = 1, ranks: int = 1) -> dict[str, Any]:
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    memory = next(
        line.split()[1]
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("MemTotal")
    )
    return {
        "cpu": f"{model[0] if model else platform.machine()} x {len(model)}",
        "memory_gib": round(int(memory) / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": ranks,
        "threads_per_rank": threads,
    }


def alternated(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns so that all meet the same weather; one unmeasured
    round before."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if index:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """The median over rounds of one call's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def report(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))
