"""What a model of the demo's size learns; this takes some minutes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.evaluation.evaluator import Evaluator
from cnsdiff_dist.sections import Evaluation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("demo") / "data")
    assert main(["prepare", out, "--synthetic"]) == 0
    return out


def _most_popular(data: str, split: str, world: World) -> float:
    manifest = load_manifest(data)
    graph = open_graph(data, manifest)
    evaluator = Evaluator(data, manifest, graph, split, Evaluation(), world)
    degree = torch.from_numpy(np.diff(graph.item_indptr)).float()
    return evaluator(torch.ones(manifest.users, 1), degree[:, None])["metrics"]["recall@20"]


@pytest.mark.parametrize("kind", ["uniform", "cnsdiff"])
def test_the_demo_learns_taste_not_popularity(
    demo: str, tmp_path: Path, world: World, kind: str
) -> None:
    run = tmp_path / "run"
    words = [f"data.url={demo}", f"run.dir={run}", f"negatives.kind={kind}"]
    if kind == "uniform":
        words += ["objective.kind=bpr", "objective.similarity=dot", "objective.temperature=1"]
        words += ["tables.lr=0.1", "train.patience=6"]
    assert main(["train", "configs/demo.yaml", *words]) == 0
    for split, factor in (("test_ood", 3.0), ("test_iid", 1.3)):
        assert main(["evaluate", str(run), "--split", split]) == 0
        result = json.loads((run / f"evaluations/{split}.json").read_text())
        recall, popular = result["metrics"]["recall@20"], _most_popular(demo, split, world)
        assert recall > factor * popular, (split, recall, popular)
    if kind == "cnsdiff":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        errors = [line["denoising_error"] for line in lines if line["kind"] == "train"]
        assert errors[-1] < 0.7  # 1.0 is the mean predictor
