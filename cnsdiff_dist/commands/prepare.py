"""``cnsdiff prepare``: make a dataset directory from raw interaction logs."""

import argparse
import math
import sys
from typing import TYPE_CHECKING

from cnsdiff_dist import storage
from cnsdiff_dist.commands.options import add_command
from cnsdiff_dist.data.dataset import MANIFEST
from cnsdiff_dist.data.schema import SPLITS, Manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.log_formats import FORMATS, ROLES, LogFormat
from cnsdiff_dist.prepare.pipeline import prepare
from cnsdiff_dist.prepare.recipe import Recipe
from cnsdiff_dist.prepare.shifts import SHIFTS
from cnsdiff_dist.prepare.synthetic import Synthetic

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers

_EXAMPLES = """\
examples:
  one log, split here for the shift you expect
    cnsdiff prepare data/ml --log ml-100k.inter --min-rating 4 --shift temporal
    cnsdiff prepare s3://bucket/data --log 's3://bucket/logs/*.parquet' --shift popularity
  a biased log and a uniform one
    cnsdiff prepare data/coat --log user.txt --uniform random.txt --shift exposure \\
        --columns user,item,rating --min-rating 4
  splits that exist already
    cnsdiff prepare data/food --train train.txt --valid-iid valid_iid.txt \\
        --test-iid test_iid.txt --test-ood test_ood.txt --valid-ood-fraction 0
  data with a known causal model, to try things
    cnsdiff prepare data/synthetic --synthetic
"""


def register(subparsers: "Subparsers") -> None:
    """Add the ``prepare`` command."""
    parser = add_command(
        subparsers,
        "prepare",
        run,
        help="make a dataset from raw interaction logs",
        description="Turn raw interaction logs into a dataset: id maps, splits with an "
        "out-of-distribution test and validation, and the train graph. Files and OUT may be "
        "paths or URLs (s3://, gs://, ..); a log larger than memory is fine.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("out", metavar="OUT", help="the dataset directory to write")
    _add_inputs(parser)
    _add_format(parser)
    _add_splitting(parser)
    parser.add_argument("--name", default="", help="name in the manifest; default: OUT's last part")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the dataset in OUT")
    existing.add_argument(
        "--if-missing", action="store_true", help="do nothing if there is a dataset in OUT"
    )
    parser.add_argument(
        "--memory-limit",
        default="4GB",
        metavar="SIZE",
        help="memory for sorts and joins; beyond it they spill to disk (default %(default)s)",
    )
    parser.set_defaults(cleans_up=True)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("input: one of --log, --train, --synthetic")
    options.add_argument("--log", nargs="+", metavar="FILE", help="one log; quoted globs are fine")
    options.add_argument(
        "--uniform",
        nargs="+",
        metavar="FILE",
        help="beside --log: uniformly exposed items, to be test_ood",
    )
    for split in SPLITS:
        options.add_argument(_flag(split), nargs="+", metavar="FILE", help=f"a ready {split} split")
    options.add_argument("--synthetic", action="store_true", help="generate data with known truth")
    for flag, default in (("--users", Synthetic.users), ("--items", Synthetic.items)):
        options.add_argument(
            flag,
            type=_count,
            default=default,
            metavar="N",
            help="of --synthetic (default %(default)s)",
        )


def _add_format(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("how to read the logs")
    options.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="auto: by extension, then by the first line; inter: RecBole; "
        "triples: 'user item 1' lines (default auto)",
    )
    options.add_argument(
        "--columns",
        metavar="NAMES",
        help="names of a file without header, such as user,item,rating",
    )
    for role in ROLES:
        options.add_argument(f"--{role}-column", metavar="NAME", help=f"the {role} column")
    options.add_argument(
        "--min-rating",
        type=_finite,
        metavar="X",
        help="positives are rated X or more; default: every row is one",
    )
    options.add_argument(
        "--duplicates",
        choices=("error", "drop"),
        default="error",
        help="a (user, item) twice in a split: stop, or keep the first",
    )
    options.add_argument(
        "--unknown",
        choices=("error", "drop"),
        default="error",
        help="an id in a ready split but not in train: stop, or drop the row",
    )


def _add_splitting(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("how to split; fractions are of the rows still in train")
    options.add_argument(
        "--shift",
        choices=SHIFTS,
        help="what differs between train and test_ood; needed with --log. "
        "With --train it shapes valid_ood (default popularity)",
    )
    for flag, default, what in (
        ("--test-fraction", 0.2, "for test_ood, then for test_iid"),
        ("--valid-fraction", 0.1, "for valid_iid, if it is not given"),
        ("--valid-ood-fraction", 0.1, "for valid_ood, if it is not given"),
    ):
        options.add_argument(
            flag,
            type=_fraction,
            default=default,
            metavar="F",
            help=f"{what}; 0 for none (default %(default)s)",
        )
    options.add_argument(
        "--environments",
        type=_count,
        default=5,
        metavar="N",
        help="popularity buckets of items (default %(default)s)",
    )
    options.add_argument(
        "--hashed-users",
        type=_natural,
        default=0,
        metavar="N",
        help="rare users share N rows by a hash of their id, and so do users that come later: "
        "`recommend` serves them (default 0: each has its own, and unknown ones are an error)",
    )
    options.add_argument(
        "--hashed-below",
        type=_count,
        metavar="K",
        help="of --hashed-users: rare is who has fewer than K train rows (default 5)",
    )
    options.add_argument("--seed", type=_natural, default=0, metavar="S", help="default 0")


def _flag(split: str) -> str:
    return "--" + split.replace("_", "-")


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not an integer") from None


def _fraction(text: str) -> float:
    value = _finite(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _count(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _natural(text: str) -> int:
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def run(args: argparse.Namespace) -> None:
    """Prepare the dataset; write a line per stage to stderr and the summary to stdout.

    Raises:
        UserError: the options do not fit together, or the input or output is bad.
    """
    recipe = recipe_from(args)
    if args.if_missing and storage.exists(storage.join(args.out, MANIFEST)):
        print(f"{storage.display(args.out)}: a dataset is here already")
        return
    print(summary(prepare(recipe, lambda line: print(line, file=sys.stderr, flush=True))))


def recipe_from(args: argparse.Namespace) -> Recipe:
    """Turn the command line into a recipe.

    Raises:
        UserError: the options do not fit together.
    """
    sources, shift = _sources(args)
    if args.hashed_below and not args.hashed_users:
        raise UserError("--hashed-below goes with --hashed-users; give both")
    if args.synthetic and args.min_rating is not None:
        raise UserError("--min-rating goes with logs that have ratings, not with --synthetic")
    return Recipe(
        out=args.out,
        sources=sources,
        given=args.train is not None,
        shift=shift,
        synthetic=Synthetic(args.users, args.items, args.seed) if args.synthetic else None,
        log_format=_log_format(args),
        min_rating=args.min_rating,
        test_fraction=args.test_fraction,
        valid_fraction=args.valid_fraction,
        valid_ood_fraction=args.valid_ood_fraction,
        environments=args.environments,
        drop_duplicates=args.duplicates == "drop",
        drop_unknown=args.unknown == "drop",
        hashed_users=args.hashed_users,
        hashed_below=args.hashed_below or Recipe.hashed_below,
        name=args.name,
        seed=args.seed,
        overwrite=args.overwrite,
        memory_limit=args.memory_limit,
    )


def _log_format(args: argparse.Namespace) -> LogFormat:
    columns = tuple(args.columns.split(",")) if args.columns else ()
    role_columns = {role: getattr(args, f"{role}_column") for role in ROLES}
    return LogFormat(args.format, columns, **role_columns)


def _sources(args: argparse.Namespace) -> tuple[dict[str, list[str]], str | None]:
    """Return the logs of each split, and the shift."""
    given = {split: files for split in SPLITS if (files := getattr(args, split))}
    inputs = [bool(args.log), bool(given), args.synthetic]
    if sum(inputs) != 1:
        raise UserError("give one of --log, --train (with its splits) and --synthetic")
    if args.uniform and not args.log:
        raise UserError("--uniform goes with --log, the biased log; give both")
    if args.synthetic:
        return {}, "exposure"  # The generated logs are a biased and a uniform one.
    if given:
        if not args.train:
            raise UserError(f"{_flag(next(iter(given)))} goes with --train; give both")
        return given, args.shift
    if args.uniform:
        if args.shift not in (None, "exposure"):
            raise UserError(f"--uniform makes the shift exposure, not {args.shift}; drop --shift")
        return {"train": args.log, "test_ood": args.uniform}, "exposure"
    if args.shift is None:
        raise UserError("--log needs --shift popularity, temporal or random, or a --uniform log")
    if args.shift == "exposure":
        raise UserError("--shift exposure needs --uniform, a log of uniformly exposed items")
    return {"train": args.log}, args.shift


def summary(manifest: Manifest) -> str:
    """Describe a prepared dataset for the terminal."""
    density = manifest.graph.edges / (manifest.users * manifest.items)
    lines = [
        f"{manifest.name}: {manifest.users:,} users, {manifest.items:,} items, "
        f"train density {density:.4%}, {manifest.environments} environments"
    ]
    for name, split in manifest.splits.items():
        lines.append(f"  {name:<10}{split.rows:>14,} rows")
    for reason, count in manifest.dropped.items():
        if count:
            lines.append(f"  dropped   {count:>14,} rows  {reason}")
    return "\n".join([*lines, f"  digest {manifest.digest[:16]}"])
