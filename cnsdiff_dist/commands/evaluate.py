"""``cnsdiff evaluate``: the metrics of a run on a split."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from cnsdiff_dist import storage
from cnsdiff_dist.commands.options import add_alpha, add_command, add_data, add_run
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers

_EPILOG = """\
examples:
  cnsdiff evaluate runs/demo --split test_ood
  torchrun --nproc-per-node 2 -m cnsdiff_dist evaluate runs/demo --split test_iid
"""
_METRICS = ("recall", "ndcg", "hit", "precision")


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        help="rank every item for every user of a split",
        description="Full ranking of a run's best checkpoint (by validation) on a split. Train "
        "items are masked, and on a test split the validation items too. Prints a table and "
        "writes RUN/evaluations/SPLIT.json.",
        epilog=_EPILOG,
    )
    add_run(parser)
    parser.add_argument("--split", default="test_ood", help="default: %(default)s")
    parser.add_argument("--k", type=int, nargs="+", metavar="K", help="default: the run's")
    add_alpha(parser)
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist.inference.trained_model import open_trained

    if args.k and min(args.k) < 1:
        raise UserError(f"--k {min(args.k)}: lists have at least 1 item")
    if args.split == "train":
        raise UserError("--split train: train items are masked; choose a test or validation split")
    model, alpha = open_trained(args.run_url, args.data).with_alpha(args.alpha)
    evaluation = model.run.config.evaluation
    if args.k:
        evaluation = evaluation.model_copy(update={"k": tuple(sorted(set(args.k)))})
    evaluator = model.run.evaluator(args.split, evaluation)
    result = {
        "run": storage.display(args.run_url),
        "step": model.step,
        "dataset": model.run.manifest.name,
        "alpha": alpha,
        **evaluator(model.user_RD, model.item_RD),
    }
    if model.run.world.is_main:
        path = f"{args.run_url}/evaluations/{args.split}.json"
        text = json.dumps(result, indent=2) + "\n"
        storage.write_text(path, text)
        if args.json:
            print(text, end="")
        else:
            _print_result(result, evaluation.k, storage.display(path))


def _print_result(result: dict[str, Any], ks: tuple[int, ...], path: str) -> None:
    _print_table(result, ks)
    for k in ks:
        coverage, popularity = (result["metrics"][f"{n}@{k}"] for n in ("coverage", "popularity"))
        print(
            f"top {k}: {coverage:.1%} of the catalogue recommended, "
            f"mean train degree {popularity:.1f}"
        )
    print(f"masked: {', '.join(result['masked'])}; written to {path}")


def _print_table(result: dict[str, Any], ks: tuple[int, ...]) -> None:
    """Print the metrics of all items, and of each environment's items alone."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{result['dataset']} {result['split']}, {result['users']} users, step {result['step']}"
    title += f", alpha {result['alpha']:g}"
    names = [f"{name}@{k}" for k in ks for name in _METRICS]
    table = Table("items", "users", *names, title=Text(title))
    rows = [("all", result["users"], result["metrics"])]
    rows += [(_degrees(entry), entry["users"], entry) for entry in result["environments"]]
    for label, users, metrics in rows:
        table.add_row(label, str(users), *(f"{metrics[name]:.4f}" for name in names))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)


def _degrees(entry: dict[str, Any]) -> str:
    low, high = entry["train_degree"]
    return f"degree {low}+" if high is None else f"degree {low}-{high - 1}"
