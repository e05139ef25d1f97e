"""Watch a training from outside: its Prometheus endpoint and its status."""

import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


def scrape(port: int) -> str:
    """What the endpoint of a training on this machine says now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The labels and values of each sample, by its name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@dataclass
class Watched:
    """What was seen of a training while it ran and after it was preempted.

    Attributes:
        scrape: what its Prometheus endpoint said while it ran.
        running, preempted: its status at either time.
        closed: the port was free again afterwards.
    """

    run: Path
    scrape: str
    running: dict[str, Any]
    preempted: dict[str, Any]
    closed: bool
