"""The stages of ``prepare``, in order: from raw logs to a published dataset.

Every result is written in a total order and every draw is a hash of (seed, user, item), so the
bytes of a dataset do not depend on the number of threads.
"""

from pathlib import Path

from cnsdiff_dist import storage
from cnsdiff_dist.data.schema import SPLITS, Manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare import publishing, splitting
from cnsdiff_dist.prepare.database import Database, count_rows, open_database
from cnsdiff_dist.prepare.dataset_files import write_files, write_manifest
from cnsdiff_dist.prepare.hashed_users import share_rows
from cnsdiff_dist.prepare.id_maps import assign_codes, assign_rows
from cnsdiff_dist.prepare.ingest import Say, ingest
from cnsdiff_dist.prepare.log_formats import Log
from cnsdiff_dist.prepare.recipe import Recipe
from cnsdiff_dist.prepare.synthetic import Synthetic, write_logs, write_truth

Sources = dict[str, list[str]]


def prepare(recipe: Recipe, say: Say) -> Manifest:
    """Build the dataset at ``recipe.out``; ``say`` gets a line per stage.

    Raises:
        UserError: the input is bad, or the output cannot be written. Nothing is left behind.
    """
    publishing.check_output(recipe.out, recipe.overwrite)
    with publishing.staging(recipe.out) as staged:
        built = staged / "dataset"
        built.mkdir()
        sources = recipe.sources
        if recipe.synthetic:
            sources = _generate(recipe.synthetic, recipe.out, staged / "logs", built / "truth")
            say(f"generated {recipe.synthetic.users:,} users and {recipe.synthetic.items:,} items")
        with open_database(staged, recipe.memory_limit, recipe.out) as db:
            manifest = _build(db, recipe, sources, built, say)
        publishing.publish(built, recipe.out)
    say(f"wrote {storage.display(recipe.out)}")
    return manifest


def _generate(synthetic: Synthetic, out: str, logs: Path, truth: Path) -> Sources:
    with storage.explained(out, "write"):
        sources = write_logs(synthetic, logs)
        write_truth(synthetic, truth)
    return sources


def _build(db: Database, recipe: Recipe, sources: Sources, built: Path, say: Say) -> Manifest:
    logs = _read_logs(db, recipe, sources, say)
    dropped = _clean(db, recipe, logs, say)
    if recipe.cuts_future:
        # Cut first, so that users and items of the future alone are dropped as cold.
        splitting.cut(db, "test_ood", "temporal", recipe.test_fraction)
    dropped["cold"] = _drop_cold(db, recipe, logs)
    if recipe.hashed_users:
        dropped["hashed"] = share_rows(db, recipe.hashed_users, recipe.hashed_below)
        say(f"dropped {dropped['hashed']:,} hashed")
    _cut_splits(db, recipe, sources, say)
    say("writing splits, id maps and graph")
    timed = all("timestamp" in log.roles for log in logs)
    with storage.explained(recipe.out, "write"):
        files = write_files(db, built, recipe.environments, timed)
        return write_manifest(built, recipe, files, dropped)


def _read_logs(db: Database, recipe: Recipe, sources: Sources, say: Say) -> list[Log]:
    """Read all logs into ``coded``."""
    files = [
        (SPLITS.index(split), url)
        for split, patterns in sources.items()
        for pattern in patterns
        for url in storage.glob(pattern)
    ]
    logs = ingest(db, files, recipe.log_format, say)
    recipe.check_columns(logs, [split for split, _ in files])
    if recipe.min_rating is None:
        _note_ratings(db, say)
    assign_codes(db)
    return logs


def _note_ratings(db: Database, say: Say) -> None:
    ((low, high),) = db.execute("SELECT min(rating), max(rating) FROM raw").fetchall()
    if low is not None and low < high:
        say(f"ratings go from {low:g} to {high:g}; without --min-rating every row is a positive")


def _clean(db: Database, recipe: Recipe, logs: list[Log], say: Say) -> dict[str, int]:
    """Make ``rows``; return the number of dropped rows by reason."""
    dropped = splitting.clean(db, logs, recipe.min_rating, recipe.drop_duplicates, recipe.seed)
    say("dropped " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    return dropped


def _drop_cold(db: Database, recipe: Recipe, logs: list[Log]) -> int:
    allowed = recipe.drop_unknown or not recipe.given
    dropped = splitting.drop_cold(db, logs, allowed)
    if not count_rows(db, "train"):
        where = storage.display(logs[0].url)
        raise UserError(f"{where}: no train row is left; lower --min-rating")
    return dropped


def _cut_splits(db: Database, recipe: Recipe, sources: Sources, say: Say) -> None:
    # The users who share a table row are the last ones; their rows stay in train.
    unshared = assign_rows(db) - recipe.hashed_users
    splitting.protect(db)
    for split, shift, fraction in recipe.cuts(sources):
        splitting.cut(db, split, shift, fraction, unshared)
        say(f"cut {split}: {count_rows(db, split):,} rows by {shift} order")
