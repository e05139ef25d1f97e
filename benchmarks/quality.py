"""Means over seeds of LightGCN-BPR and CNSDiff under one preset, through the command line.

    python -m benchmarks.quality --config configs/food.yaml --data data/food --seeds 0 1 2

Each model is the best checkpoint by the preset's validation; the tests are only reported. A run
that is finished is not repeated.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from cnsdiff_dist.cli import main as cnsdiff
from cnsdiff_dist.data.dataset import load_manifest

METRICS = ("recall@10", "recall@20", "ndcg@20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/quality", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for seed in args.seeds:
        for kind in ("uniform", "cnsdiff"):
            for split, metrics in _results(args, kind, seed).items():
                found[kind, split].append(metrics)
    print("\n| negatives | split | " + " | ".join(METRICS) + " |")
    print("|---|---|" + "---|" * len(METRICS))
    for (kind, split), results in sorted(found.items()):
        cells = [_mean([result[name] for result in results]) for name in METRICS]
        print(f"| {kind} | {split} | " + " | ".join(cells) + " |")


def _results(args: argparse.Namespace, kind: str, seed: int) -> dict[str, dict[str, float]]:
    """Train and evaluate one run; its metrics by split."""
    run = f"{args.runs}/{kind}-{seed}"
    words = [f"data.url={args.data}", f"run.dir={run}", f"run.seed={seed}"]
    _run("train", args.config, *words, f"negatives.kind={kind}", *args.overrides)
    found = {}
    for split in load_manifest(args.data).splits:
        if split.startswith("test"):
            _run("evaluate", run, "--split", split, "--data", args.data)
            text = Path(f"{run}/evaluations/{split}.json").read_text(encoding="utf-8")
            found[split] = json.loads(text)["metrics"]
    return found | {"validation (best)": _best_validation(Path(run))}


def _best_validation(run: Path) -> dict[str, float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [line for line in map(json.loads, lines) if line["kind"] != "train"]
    best: dict[str, float] = max(evaluations, key=lambda line: line["recall@20"])
    return best


def _run(*words: str) -> None:
    if code := cnsdiff(list(words)):
        raise SystemExit(code)


def _mean(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
