"""Every sampler trains the same at one and two ranks."""

import json
from pathlib import Path

import pytest

from cnsdiff_dist.samplers.registry import SAMPLERS
from tests.support.ranks import run_ranks
from tests.support.small import small_config

KINDS = list(SAMPLERS)


def _train(dataset: str, run: str, kinds: list[str]) -> dict[str, list[float]]:
    """The loss curve of every kind."""
    from cnsdiff_dist.commands.train import train

    curves = {}
    for kind in kinds:
        pooled = kind in ("in_batch", "mixed", "cnsdiff")
        config = small_config(
            dataset,
            f"{run}/{kind}",
            negatives={"kind": kind},
            objective={"kind": "softmax" if pooled else "bpr"},
            loss={"contrastive": 0.1 if pooled else 0.0},
            generator={"hidden": 32, "levels": (10, 20)},
            train={"max_steps": 14, "log_every": 1},  # an epoch and two steps of the next
        )
        train(config)
        lines = Path(f"{run}/{kind}/metrics.jsonl").read_text().splitlines()
        records = [line for line in map(json.loads, lines) if line["kind"] == "train"]
        curves[kind] = [line["loss"] for line in records]
    return curves


@pytest.mark.distributed
def test_every_kind_is_the_same_at_one_and_two_ranks(dataset: str, tmp_path: Path) -> None:
    (one,) = run_ranks(1, _train, dataset, str(tmp_path / "1"), KINDS)
    two, _ = run_ranks(2, _train, dataset, str(tmp_path / "2"), KINDS)
    for kind in KINDS:
        assert len(one[kind]) > 3
        assert two[kind] == pytest.approx(one[kind], rel=5e-4, abs=1e-5), kind
