"""Raw logs to a prepared dataset, out of core: the stages, in order.

DuckDB holds the log on disk in ``rows`` (split, user, item, timestamp, ..) and spills its
sorts and joins, so memory bounds neither. Every result that is written is totally ordered
and every draw is a hash of (seed, user, item): the bytes do not depend on threads.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from cnsdiff_dist import storage
from cnsdiff_dist.data import export, writer
from cnsdiff_dist.data.dataset import MANIFEST
from cnsdiff_dist.data.ingest import Say, create_raw, ingest, place
from cnsdiff_dist.data.readers import Log, LogFormat
from cnsdiff_dist.data.schema import SPLITS, Manifest
from cnsdiff_dist.data.shifts import order, share, uniform
from cnsdiff_dist.data.synthetic import World, write_logs, write_truth
from cnsdiff_dist.errors import UserError

TRAIN = 0
# A pair that is in several splits stays in the first of these.
_PRECEDENCE = ("train", "test_iid", "test_ood", "valid_iid", "valid_ood")


@dataclass(frozen=True)
class Recipe:
    """What to prepare. ``sources`` maps a split to its logs (URLs or globs).

    ``given`` says that the logs are splits already: then only validation is cut from train.
    ``shift`` is one of SHIFTS, or None for given splits whose shift is not named. Fractions are
    of the rows that are left when their split is cut, in the order test_ood, test_iid,
    valid_ood, valid_iid. ``synthetic`` replaces the sources.
    """

    out: str
    sources: dict[str, list[str]]
    given: bool = False
    shift: str | None = None
    synthetic: World | None = None
    how: LogFormat = field(default_factory=LogFormat)
    min_rating: float | None = None
    test_fraction: float = 0.2
    valid_fraction: float = 0.1
    valid_ood_fraction: float = 0.1
    environments: int = 5
    drop_duplicates: bool = False
    drop_unknown: bool = False
    name: str = ""
    seed: int = 0
    overwrite: bool = False
    memory_limit: str = "4GB"


def prepare(recipe: Recipe, say: Say) -> Manifest:
    """Build the dataset at ``recipe.out``; ``say`` gets a line per stage.

    Raises:
        UserError: bad input, or an output that cannot be written. Nothing is left behind.
    """
    writer.refuse_existing(recipe.out, recipe.overwrite)
    with writer.staging(recipe.out) as room:
        built = room / "dataset"
        built.mkdir()
        sources = _synthesise(recipe, room, built, say) if recipe.synthetic else recipe.sources
        with _database(room, recipe, say) as db:
            manifest = _build(db, recipe, sources, built, say)
        writer.publish(built, recipe.out)
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
    finally:
        if db is not None:
            _close(db)


def _close(db: duckdb.DuckDBPyConnection) -> None:
    try:
        db.close()
    except duckdb.Error:
        pass  # closing flushes, which fails on a full disk; the file is about to be deleted


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
    dropped = _clean(db, recipe, logs)
    say(f"dropped {_counts(dropped)}")
    if _cuts_future(recipe):
        _cut(db, recipe, "test_ood", "temporal", recipe.test_fraction, protect=False)
    dropped["cold"] = _drop_cold(db, recipe, logs)
    if not _count(db, "train"):
        raise UserError(
            f"{storage.display(files[0][1])}: no train row is left; check --min-rating and the files"
        )
    export.number_ids(db)
    _protect(db, recipe.seed)
    for split, shift, fraction in _cuts(recipe, sources):
        _cut(db, recipe, split, shift, fraction)
        say(f"cut {split}: {_count(db, split):,} rows by {shift} order")
    say("writing splits, id maps and graph")
    with storage.explained(recipe.out, "write"):
        parts = export.write_parts(db, built, recipe.seed, recipe.environments, timed)
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


def _clean(db: duckdb.DuckDBPyConnection, recipe: Recipe, logs: list[Log]) -> dict[str, int]:
    """``raw`` to ``rows``: ids as numbers, and none of the rows that are not to be used."""
    export.code_ids(db)
    rank = "CASE split " + " ".join(
        f"WHEN {SPLITS.index(name)} THEN {place}" for place, name in enumerate(_PRECEDENCE)
    )
    low = "false" if recipe.min_rating is None else f"rating < {recipe.min_rating!r}"
    db.execute(f"""
        CREATE TABLE judged AS
        SELECT *, CASE WHEN nth > 1 THEN 'duplicate' WHEN rank > first THEN 'in_other_split'
                       WHEN {low} THEN 'below_min_rating' END AS reason
        FROM (SELECT *, min(rank) OVER pair AS first,
                     row_number() OVER (PARTITION BY "user", item, split ORDER BY file, line) AS nth
              FROM (SELECT *, {rank} END AS rank FROM coded)
              WINDOW pair AS (PARTITION BY "user", item))
    """)
    db.execute("DROP TABLE coded")
    found = dict(db.execute("SELECT reason, count(*) FROM judged GROUP BY reason").fetchall())
    if found.get("duplicate") and not recipe.drop_duplicates:
        raise _duplicate(db, logs)
    db.execute(
        "CREATE TABLE rows AS SELECT split, \"user\", item, \"timestamp\", file, line, "
        "false AS kept FROM judged WHERE reason IS NULL"
    )
    db.execute("DROP TABLE judged")
    reasons = ("duplicate", "in_other_split", "below_min_rating")
    return {reason: found.get(reason, 0) for reason in reasons}


def _duplicate(db: duckdb.DuckDBPyConnection, logs: list[Log]) -> UserError:
    ((file, line, other_file, other, user, item),) = db.execute("""
        SELECT b.file, b.line, a.file, a.line, u.id, i.id FROM judged b
        JOIN judged a ON a."user" = b."user" AND a.item = b.item AND a.split = b.split AND a.nth = 1
        JOIN users u ON u.code = b."user" JOIN items i ON i.code = b.item
        WHERE b.nth > 1 ORDER BY b.file, b.line LIMIT 1
    """).fetchall()
    return UserError(
        f"{place(logs[file], line)}: user {user}, item {item} again, after "
        f"{place(logs[other_file], other)}; --duplicates drop keeps the first"
    )


def _drop_cold(db: duckdb.DuckDBPyConnection, recipe: Recipe, logs: list[Log]) -> int:
    """Drop the rows outside train whose user or item is not in train; count them."""
    db.execute("""
        CREATE TEMP TABLE warm AS
        SELECT DISTINCT 'user' AS side, "user" AS code FROM rows WHERE split = 0
        UNION ALL SELECT DISTINCT 'item', item FROM rows WHERE split = 0
    """)
    unknown = {
        side: f'"{side}" NOT IN (SELECT code FROM warm WHERE side = \'{side}\')'
        for side in ("user", "item")
    }
    if recipe.given and not recipe.drop_unknown:
        for side, condition in unknown.items():
            bad = db.execute(
                f'SELECT file, line, id FROM rows JOIN {side}s ON code = "{side}" '
                f"WHERE {condition} ORDER BY file, line LIMIT 1"
            ).fetchall()
            for file, line, name in bad:
                raise UserError(
                    f"{place(logs[file], line)}: {side} {name} is not in train; "
                    "--unknown drop leaves such rows out"
                )
    before = _count(db)
    db.execute(f"CREATE TABLE warm_rows AS SELECT * FROM rows WHERE NOT ({' OR '.join(unknown.values())})")
    db.execute("DROP TABLE rows; DROP TABLE warm; ALTER TABLE warm_rows RENAME TO rows")
    return before - _count(db)


def _protect(db: duckdb.DuckDBPyConnection, seed: int) -> None:
    """Mark the first row of every user and item: cuts leave it in train, so nobody turns cold."""
    first = f'"timestamp", {uniform(seed, "protect")}, "user", item) = 1'
    db.execute(f"""
        CREATE TABLE marked AS SELECT * REPLACE (
            row_number() OVER (PARTITION BY split, "user" ORDER BY {first}
            OR row_number() OVER (PARTITION BY split, item ORDER BY {first} AS kept)
        FROM rows
    """)
    db.execute("DROP TABLE rows; ALTER TABLE marked RENAME TO rows")


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


def _cut(
    db: duckdb.DuckDBPyConnection,
    recipe: Recipe,
    split: str,
    shift: str,
    fraction: float,
    protect: bool = True,
) -> None:
    """Move the first rows of train, in the shift's order, to another split."""
    db.execute(f"""
        CREATE TEMP TABLE taken AS SELECT "user", item
        FROM rows JOIN (SELECT item, count(*) AS degree FROM rows WHERE split = 0 GROUP BY item)
             USING (item)
        WHERE split = 0 AND NOT ({protect} AND kept)
        ORDER BY {order(shift, recipe.seed, split)}, "user", item
        LIMIT {share(_count(db, "train"), fraction)}
    """)
    db.execute(f"""
        CREATE TABLE cut AS SELECT rows.* REPLACE (
            CASE WHEN taken.item IS NULL THEN split ELSE {SPLITS.index(split)} END AS split)
        FROM rows LEFT JOIN taken
            ON split = 0 AND taken."user" = rows."user" AND taken.item = rows.item
    """)
    db.execute("DROP TABLE rows; DROP TABLE taken; ALTER TABLE cut RENAME TO rows")


def _count(db: duckdb.DuckDBPyConnection, split: str | None = None) -> int:
    where = "" if split is None else f"WHERE split = {SPLITS.index(split)}"
    ((rows,),) = db.execute(f"SELECT count(*) FROM rows {where}").fetchall()
    return int(rows)


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def _write_manifest(
    recipe: Recipe, parts: export.Parts, dropped: dict[str, int], built: Path
) -> Manifest:
    manifest = Manifest(
        schema_version=1,
        name=recipe.name or storage.display(recipe.out).rstrip("/").rpartition("/")[2],
        shift=_shift(recipe),
        dropped=dropped,
        digest="",
        **parts.__dict__,
    )
    content = manifest.model_copy(update={"name": ""}).model_dump_json()
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
    }
