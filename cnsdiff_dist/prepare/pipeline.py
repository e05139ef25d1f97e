"""Raw logs to a prepared dataset, out of core: the stages, in order.

DuckDB holds the log on disk in ``rows`` (split, user, item, timestamp, ..) and spills its
sorts and joins, so memory bounds neither. Every result that is written is totally ordered
and every draw is a hash of (seed, user, item): the bytes do not depend on threads.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import MANIFEST
from cnsdiff_dist.data.schema import SPLITS, Manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare import dataset_files, publishing, splits
from cnsdiff_dist.prepare.hashed_users import share_rows
from cnsdiff_dist.prepare.ingest import Say, create_raw, ingest
from cnsdiff_dist.prepare.log_formats import Log, LogFormat
from cnsdiff_dist.prepare.synthetic import Synthetic, write_logs, write_truth

TRAIN = 0


@dataclass(frozen=True)
class Recipe:
    """What to prepare. ``sources`` maps a split to its logs (URLs or globs).

    ``given`` says that the logs are splits already: then only validation is cut from train.
    ``shift`` is one of SHIFTS, or None for given splits whose shift is not named. Fractions are
    of the rows that are left when their split is cut, in the order test_ood, test_iid,
    valid_ood, valid_iid. ``synthetic`` replaces the sources. Users with fewer than ``hashed_below``
    train rows share ``hashed_users`` rows, if that is not 0.
    """

    out: str
    sources: dict[str, list[str]]
    given: bool = False
    shift: str | None = None
    synthetic: Synthetic | None = None
    how: LogFormat = field(default_factory=LogFormat)
    min_rating: float | None = None
    test_fraction: float = 0.2
    valid_fraction: float = 0.1
    valid_ood_fraction: float = 0.1
    environments: int = 5
    drop_duplicates: bool = False
    drop_unknown: bool = False
    hashed_users: int = 0
    hashed_below: int = 5
    name: str = ""
    seed: int = 0
    overwrite: bool = False
    memory_limit: str = "4GB"


def prepare(recipe: Recipe, say: Say) -> Manifest:
    """Build the dataset at ``recipe.out``; ``say`` gets a line per stage.

    Raises:
        UserError: bad input, or an output that cannot be written. Nothing is left behind.
    """
    publishing.check_output(recipe.out, recipe.overwrite)
    with publishing.staging(recipe.out) as room:
        built = room / "dataset"
        built.mkdir()
        sources = _synthesise(recipe, room, built, say) if recipe.synthetic else recipe.sources
        with _database(room, recipe, say) as db:
            manifest = _build(db, recipe, sources, built, say)
        publishing.publish(built, recipe.out)
    say(f"wrote {storage.display(recipe.out)}")
    return manifest


def _synthesise(recipe: Recipe, room: Path, built: Path, say: Say) -> dict[str, list[str]]:
    assert recipe.synthetic is not None
    with storage.explained(recipe.out, "write"):
        sources = write_logs(recipe.synthetic, room / "logs")
        write_truth(recipe.synthetic, built / "truth")
    say(f"generated {recipe.synthetic.users:,} users and {recipe.synthetic.items:,} items")
    return sources


@contextmanager
def _database(room: Path, recipe: Recipe, say: Say) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database on disk, with its failures as UserErrors about the output."""
    db = None
    try:
        db = duckdb.connect(str(room / "work.duckdb"))
        db.execute(f"SET temp_directory='{str(room / 'spill').replace(chr(39), chr(39) * 2)}'")
        try:
            db.execute("SET memory_limit=?", [recipe.memory_limit])
        except duckdb.Error:
            raise UserError(
                f"--memory-limit {recipe.memory_limit}: not a size; write it like 4GB"
            ) from None
        yield db
    except duckdb.OutOfMemoryException:
        raise UserError(
            f"{storage.display(recipe.out)}: cannot sort the log with {recipe.memory_limit} of "
            "memory and the disk that is free there; raise --memory-limit or free some space"
        ) from None
    except duckdb.IOException as error:
        reason = " ".join(str(error).split())[:200]
        where = f"{storage.display(recipe.out)}: cannot write"
        if "No space left" in reason:
            raise UserError(f"{where}: no space left; free some or write elsewhere") from None
        raise UserError(f"{where}: {reason}") from None
    except RuntimeError as error:
        if "interrupted" not in str(error):
            raise
        raise KeyboardInterrupt from None  # DuckDB's word for it
    finally:
        if db is not None:
            _close(db)


def _close(db: duckdb.DuckDBPyConnection) -> None:
    with suppress(duckdb.Error):  # closing flushes, which fails on a full disk
        db.close()


def _build(
    db: duckdb.DuckDBPyConnection,
    recipe: Recipe,
    sources: dict[str, list[str]],
    built: Path,
    say: Say,
) -> Manifest:
    files = [
        (SPLITS.index(split), url)
        for split, patterns in sources.items()
        for pattern in patterns
        for url in storage.glob(pattern)
    ]
    create_raw(db)
    logs = ingest(db, files, recipe.how, say)
    timed = _check_columns(recipe, logs, files)
    if recipe.min_rating is None:
        _note_ratings(db, say)
    dataset_files.code_ids(db)
    dropped = splits.clean(db, logs, recipe.min_rating, recipe.drop_duplicates, recipe.seed)
    say(f"dropped {_counts(dropped)}")
    if _cuts_future(recipe):
        splits.cut(db, "test_ood", "temporal", recipe.test_fraction)
    allowed = recipe.drop_unknown or not recipe.given
    dropped["cold"] = splits.drop_cold(db, logs, allowed)
    if not splits.count(db, "train"):
        raise UserError(f"{storage.display(files[0][1])}: no train row is left; lower --min-rating")
    if recipe.hashed_users:
        dropped["hashed"] = share_rows(db, recipe.hashed_users, recipe.hashed_below)
        say(f"dropped {dropped['hashed']:,} hashed")
    own = dataset_files.number_ids(db) - recipe.hashed_users
    splits.protect(db)
    for split, shift, fraction in _cuts(recipe, sources):
        splits.cut(db, split, shift, fraction, own)
        say(f"cut {split}: {splits.count(db, split):,} rows by {shift} order")
    say("writing splits, id maps and graph")
    with storage.explained(recipe.out, "write"):
        parts = dataset_files.write_parts(db, built, recipe.environments, timed)
        return _write_manifest(recipe, parts, dropped, built)


def _check_columns(recipe: Recipe, logs: list[Log], files: list[tuple[int, str]]) -> bool:
    """Whether every log has timestamps; UserError if a wanted column is missing."""
    for log, (split, url) in zip(logs, files, strict=True):
        has = f"{storage.display(url)}: no %s column, which %s needs; its name goes in --%s-column"
        if recipe.min_rating is not None and "rating" not in log.roles:
            raise UserError(has % ("rating", "--min-rating", "rating"))
        needs_time = recipe.shift == "temporal" and (
            not recipe.given or recipe.valid_ood_fraction > 0
        )
        if needs_time and split == TRAIN and "timestamp" not in log.roles:
            raise UserError(
                has % ("timestamp", "--shift temporal", "timestamp")
                + "; or choose --shift popularity"
                + (" or --valid-ood-fraction 0" if recipe.given else "")
            )
    return all("timestamp" in log.roles for log in logs)


def _note_ratings(db: duckdb.DuckDBPyConnection, say: Say) -> None:
    ((low, high),) = db.execute("SELECT min(rating), max(rating) FROM raw").fetchall()
    if low is not None and low < high:
        say(f"ratings go from {low:g} to {high:g}; without --min-rating every row is a positive")


def _cuts_future(recipe: Recipe) -> bool:
    return not recipe.given and recipe.shift == "temporal"


def _cuts(recipe: Recipe, sources: dict[str, list[str]]) -> list[tuple[str, str, float]]:
    """The (split, order, fraction) still to be cut from train."""
    shift = recipe.shift or "popularity"
    cuts = [
        ("test_ood", shift, 0.0 if _cuts_future(recipe) else recipe.test_fraction),
        ("test_iid", "random", recipe.test_fraction),
        ("valid_ood", shift, recipe.valid_ood_fraction),
        ("valid_iid", "random", recipe.valid_fraction),
    ]
    wanted = [cut for cut in cuts if cut[2] > 0 and cut[0] not in sources]
    return [cut for cut in wanted if not recipe.given or cut[0].startswith("valid")]


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def _write_manifest(
    recipe: Recipe, parts: dataset_files.Parts, dropped: dict[str, int], built: Path
) -> Manifest:
    manifest = Manifest(
        schema_version=3,
        name=recipe.name or storage.display(recipe.out).rstrip("/").rpartition("/")[2],
        shift=_shift(recipe),
        dropped=dropped,
        hashed_users=recipe.hashed_users,
        digest="",
        **parts.__dict__,
    )
    # Without defaults: what this version added must not change the digest of what it left alone.
    content = manifest.model_copy(update={"name": ""}).model_dump_json(exclude_defaults=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    manifest = manifest.model_copy(update={"digest": digest})
    (built / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def _shift(recipe: Recipe) -> dict[str, str | int | float | None]:
    return {
        "kind": recipe.shift or "given",
        "splits": "given" if recipe.given else "cut",
        "min_rating": recipe.min_rating,
        "test_fraction": None if recipe.given else recipe.test_fraction,
        "valid_fraction": recipe.valid_fraction,
        "valid_ood_fraction": recipe.valid_ood_fraction,
        "seed": recipe.seed,
        **({"hashed_below": recipe.hashed_below} if recipe.hashed_users else {}),
    }
