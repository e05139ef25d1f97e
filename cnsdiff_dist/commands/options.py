"""What the commands share: how one is added, and the arguments that several of them take."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(
    subparsers: "Subparsers",
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    help: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """Add a command that calls ``run`` with its arguments; the epilog is printed as it is."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_url", metavar="RUN", help="run directory")


def add_data(parser: argparse.ArgumentParser, help: str = "the dataset, if it has moved") -> None:
    parser.add_argument("--data", metavar="URL", help=help)


def add_alpha(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--alpha",
        default="auto",
        help="environment adjustment: auto (the run's calibration, else what training selected), "
        "none or a number",
    )


def add_config(
    parser: argparse.ArgumentParser, *, nargs: str | None = None, overrides: str
) -> None:
    """Add CONFIG and its overrides, which :func:`cnsdiff_dist.cli.main` also accepts after options.

    Args:
        nargs: ``?`` if CONFIG may be left out.
        overrides: the help of KEY=VALUE.
    """
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides)
