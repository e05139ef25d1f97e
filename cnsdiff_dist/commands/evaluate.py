"""``cnsdiff evaluate``: the metrics of a run on a split."""

import argparse
import json
from typing import Any

_EPILOG = """\
examples:
  cnsdiff evaluate runs/demo --split test_ood
  torchrun --nproc-per-node 2 -m cnsdiff_dist evaluate runs/demo --split test_iid
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="rank every item for every user of a split",
        description="Full ranking of a run's best checkpoint (by validation) on a split. Train "
        "items are masked, and on a test split the validation items too. Prints a table and "
        "writes RUN/evaluations/SPLIT.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_url", metavar="RUN", help="run directory")
    parser.add_argument("--split", default="test_ood", help="default: %(default)s")
    parser.add_argument("--k", type=int, nargs="+", metavar="K", help="default: the run's")
    parser.add_argument(
        "--alpha", default="auto",
        help="environment adjustment: auto (the run's calibration, else what training selected), "
        "none or a number",
    )  # fmt: skip
    parser.add_argument("--data", metavar="URL", help="the dataset, if it has moved")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist import storage
    from cnsdiff_dist.errors import UserError
    from cnsdiff_dist.inference.trained_model import open_trained

    if args.k and min(args.k) < 1:
        raise UserError(f"--k {min(args.k)}: lists have at least 1 item")
    if args.split == "train":
        raise UserError("--split train: train items are masked; choose a test or validation split")
    model, alpha = open_trained(args.run_url, args.data).with_alpha(args.alpha)
    evaluation = model.config.evaluation
    if args.k:
        evaluation = evaluation.model_copy(update={"k": tuple(sorted(set(args.k)))})
    evaluator = model.evaluator(args.split, evaluation)
    result = {
        "run": storage.display(args.run_url),
        "step": model.step,
        "dataset": model.manifest.name,
        "alpha": alpha,
        **evaluator(model.user_RD, model.item_RD),
    }
    if model.world.is_main:
        path = f"{args.run_url}/evaluations/{args.split}.json"
        text = json.dumps(result, indent=2) + "\n"
        storage.write_text(path, text)
        if args.json:
            print(text, end="")
        else:
            _print_table(result, evaluation.k, storage.display(path))


def _print_table(result: dict[str, Any], ks: tuple[int, ...], path: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = ["recall", "ndcg", "hit", "precision"]
    title = f"{result['dataset']} {result['split']}, {result['users']} users, step {result['step']}"
    title += f", alpha {result['alpha']:g}"
    columns = (f"{name}@{k}" for k in ks for name in names)
    table = Table("items", "users", *columns, title=Text(title))
    rows = [("all", result["users"], result["metrics"])]
    rows += [(_bucket(entry), entry["users"], entry) for entry in result["environments"]]
    for label, users, metrics in rows:
        cells = (f"{metrics[f'{name}@{k}']:.4f}" for k in ks for name in names)
        table.add_row(label, str(users), *cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    for k in ks:
        coverage, popularity = (result["metrics"][f"{n}@{k}"] for n in ("coverage", "popularity"))
        print(
            f"top {k}: {coverage:.1%} of the catalogue recommended, "
            f"mean train degree {popularity:.1f}"
        )
    print(f"masked: {', '.join(result['masked'])}; written to {path}")


def _bucket(entry: dict[str, Any]) -> str:
    low, high = entry["train_degree"]
    return f"degree {low}+" if high is None else f"degree {low}-{high - 1}"
