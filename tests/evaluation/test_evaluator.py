"""`cnsdiff evaluate` and what a test masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest, read_split
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.evaluation.evaluator import Evaluator
from cnsdiff_dist.sections import Evaluation
from tests.support.ranks import run_ranks
from tests.support.trainers import trained_run


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(dataset, tmp_path_factory.mktemp("trained"))


def test_evaluate_writes_what_it_prints(trained: Path, dataset: str, capsys: Any) -> None:
    assert main(["evaluate", str(trained), "--split", "test_iid", "--k", "5", "20", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((trained / "evaluations/test_iid.json").read_text())
    assert printed == saved
    manifest = load_manifest(dataset)
    users, _ = read_split(dataset, manifest, "test_iid")
    assert saved["users"] == len(np.unique(users))
    assert saved["masked"] == ["train", "valid_iid", "valid_ood"]
    assert set(saved["metrics"]) == {
        f"{name}@{k}"
        for name in ("recall", "ndcg", "hit", "precision", "coverage", "popularity")
        for k in (5, 20)
    }
    assert sum(entry["items"] for entry in saved["environments"]) == manifest.items


def _evaluate(run: str) -> int:
    join_world(60)
    return main(["evaluate", run, "--split", "test_ood"])


@pytest.mark.distributed
def test_two_ranks_evaluate_like_one(trained: Path) -> None:
    path = trained / "evaluations/test_ood.json"
    assert _evaluate(str(trained)) == 0
    alone = json.loads(path.read_text())
    path.unlink()
    assert run_ranks(2, _evaluate, str(trained)) == [0, 0]
    both = json.loads(path.read_text())
    assert both["metrics"] == pytest.approx(alone["metrics"])
    assert both["users"] == alone["users"]


@pytest.mark.parametrize("test", ["test_iid", "test_ood"])
def test_validation_items_are_not_recommended_in_a_test(
    dataset: str, world: World, test: str
) -> None:
    """A model that scores the validation items highest still finds the test items."""
    manifest = load_manifest(dataset)
    graph = open_graph(dataset, manifest)
    score = torch.zeros(manifest.users, manifest.items)
    for split, value in (("valid_iid", 3.0), ("valid_ood", 2.0), (test, 1.0)):
        users, items = read_split(dataset, manifest, split)
        score[torch.tensor(users), torch.tensor(items)] = value
    evaluator = Evaluator(dataset, manifest, graph, test, Evaluation(k=(100,)), world)
    metrics = evaluator(score, torch.eye(manifest.items))["metrics"]
    assert metrics["recall@100"] == metrics["ndcg@100"] == pytest.approx(1.0)
