"""The stages of ``prepare`` on its database: which rows stay, and in which split.

``rows`` has one line per kept interaction: split (an index into SPLITS), user and item (as
numbers), timestamp, file and line (where it came from), key (random bits), kept (cuts leave it
in train).
"""

import duckdb

from cnsdiff_dist.data.schema import SPLITS
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.ingest import place
from cnsdiff_dist.prepare.log_formats import Log
from cnsdiff_dist.prepare.shifts import draw, key, order, share

Database = duckdb.DuckDBPyConnection
# A pair that is in several splits stays in the first of these.
_PRECEDENCE = ("train", "test_iid", "test_ood", "valid_iid", "valid_ood")


def clean(
    db: Database, logs: list[Log], min_rating: float | None, drop_duplicates: bool, seed: int
) -> dict[str, int]:
    """``coded`` to ``rows``, less the rows that are not to be used; counts them by reason.

    Raises:
        UserError: a pair is twice in a split, unless ``drop_duplicates``.
    """
    rank = "CASE split " + " ".join(
        f"WHEN {SPLITS.index(name)} THEN {priority}" for priority, name in enumerate(_PRECEDENCE)
    )
    low = "false" if min_rating is None else f"rating < {min_rating!r}"
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
    if found.get("duplicate") and not drop_duplicates:
        raise _duplicate(db, logs)
    db.execute(
        'CREATE TABLE rows AS SELECT split, "user", item, "timestamp", file, line, '
        f"{key(seed)} AS key, false AS kept FROM judged WHERE reason IS NULL"
    )
    db.execute("DROP TABLE judged")
    reasons = ("duplicate", "in_other_split", "below_min_rating")
    return {reason: found.get(reason, 0) for reason in reasons}


def _duplicate(db: Database, logs: list[Log]) -> UserError:
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


def drop_cold(db: Database, logs: list[Log], allowed: bool) -> int:
    """Drop the rows outside train whose user or item is not in train; count them.

    Raises:
        UserError: there is one, unless ``allowed``.
    """
    db.execute("""
        CREATE TEMP TABLE warm AS
        SELECT DISTINCT 'user' AS side, "user" AS code FROM rows WHERE split = 0
        UNION ALL SELECT DISTINCT 'item', item FROM rows WHERE split = 0
    """)
    unknown = {
        side: f"\"{side}\" NOT IN (SELECT code FROM warm WHERE side = '{side}')"
        for side in ("user", "item")
    }
    if not allowed:
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
    before = count(db)
    db.execute(
        f"CREATE TABLE warm_rows AS SELECT * FROM rows WHERE NOT ({' OR '.join(unknown.values())})"
    )
    db.execute("DROP TABLE rows; DROP TABLE warm; ALTER TABLE warm_rows RENAME TO rows")
    return before - count(db)


def protect(db: Database) -> None:
    """Mark the first row of every train user and item, so that no cut takes the last one away.

    First is earliest; ties, or a log without time, are settled by hash.
    """
    # (time, hash) in one number: aggregates of numbers are far cheaper than windows.
    place = f'coalesce("timestamp", 0)::HUGEINT * {2**64}::HUGEINT + ({draw("protect")})'
    db.execute(f"""
        CREATE TABLE marked AS
        WITH placed AS (SELECT "user", item, {place} AS place FROM rows WHERE split = 0),
             of_user AS (SELECT "user", min(place) AS first FROM placed GROUP BY "user"),
             of_item AS (SELECT item, min(place) AS first FROM placed GROUP BY item)
        SELECT rows.* REPLACE (
            kept OR split = 0 AND {place} IN (of_user.first, of_item.first) AS kept)
        FROM rows JOIN of_user USING ("user") JOIN of_item USING (item)
    """)
    db.execute("DROP TABLE rows; ALTER TABLE marked RENAME TO rows")


def cut(db: Database, split: str, shift: str, fraction: float, own: int | None = None) -> None:
    """Move the first rows of train, in the shift's order, to another split; not the kept ones.

    The fraction and the items' degrees are of all rows of train, or of those of the first ``own``
    users, where the rows of the others are kept.
    """
    mine = "true" if own is None else f'"user" < {own}'
    ((rows,),) = db.execute(f"SELECT count(*) FROM rows WHERE split = 0 AND {mine}").fetchall()
    db.execute(f"""
        CREATE TEMP TABLE taken AS SELECT "user", item
        FROM rows JOIN (SELECT item, count(*) AS degree FROM rows WHERE split = 0 AND {mine}
                        GROUP BY item) USING (item)
        WHERE split = 0 AND NOT kept
        ORDER BY {order(shift, split)}, "user", item
        LIMIT {share(rows, fraction)}
    """)
    db.execute(f"""
        CREATE TABLE cut AS SELECT rows.* REPLACE (
            CASE WHEN taken.item IS NULL THEN split ELSE {SPLITS.index(split)} END AS split)
        FROM rows LEFT JOIN taken
            ON split = 0 AND taken."user" = rows."user" AND taken.item = rows.item
    """)
    db.execute("DROP TABLE rows; DROP TABLE taken; ALTER TABLE cut RENAME TO rows")


def count(db: Database, split: str | None = None) -> int:
    where = "" if split is None else f"WHERE split = {SPLITS.index(split)}"
    ((rows,),) = db.execute(f"SELECT count(*) FROM rows {where}").fetchall()
    return int(rows)
