"""Decide which interactions stay, and in which split: stages on the table ``rows``.

``database`` describes the columns of ``rows``.
"""

from cnsdiff_dist.data.schema import SPLITS
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.database import Database, count_rows, replace_table, scalar
from cnsdiff_dist.prepare.ingest import location
from cnsdiff_dist.prepare.log_formats import Log
from cnsdiff_dist.prepare.shifts import draw, key, order, share

# A pair that is in several splits stays in the first of these.
_PRECEDENCE = ("train", "test_iid", "test_ood", "valid_iid", "valid_ood")


def clean(
    db: Database, logs: list[Log], min_rating: float | None, drop_duplicates: bool, seed: int
) -> dict[str, int]:
    """Turn ``coded`` into ``rows``, without the lines that must not be used.

    Returns:
        The number of dropped lines by reason.

    Raises:
        UserError: a pair is twice in a split, and ``drop_duplicates`` is false.
    """
    _judge(db, min_rating)
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


def _judge(db: Database, min_rating: float | None) -> None:
    """Turn ``coded`` into ``judged``, with the reason to drop a line or NULL."""
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


def _duplicate(db: Database, logs: list[Log]) -> UserError:
    ((file, line, other_file, other, user, item),) = db.execute("""
        SELECT b.file, b.line, a.file, a.line, u.id, i.id FROM judged b
        JOIN judged a ON a."user" = b."user" AND a.item = b.item AND a.split = b.split AND a.nth = 1
        JOIN users u ON u.code = b."user" JOIN items i ON i.code = b.item
        WHERE b.nth > 1 ORDER BY b.file, b.line LIMIT 1
    """).fetchall()
    return UserError(
        f"{location(logs[file], line)}: user {user}, item {item} again, after "
        f"{location(logs[other_file], other)}; --duplicates drop keeps the first"
    )


def drop_cold(db: Database, logs: list[Log], allowed: bool) -> int:
    """Drop the rows whose user or item is not in train.

    Returns:
        The number of dropped rows.

    Raises:
        UserError: there is such a row, and ``allowed`` is false.
    """
    db.execute("""
        CREATE TEMP TABLE warm AS
        SELECT DISTINCT 'user' AS side, "user" AS code FROM rows WHERE split = 0
        UNION ALL SELECT DISTINCT 'item', item FROM rows WHERE split = 0
    """)
    cold = {
        side: f"\"{side}\" NOT IN (SELECT code FROM warm WHERE side = '{side}')"
        for side in ("user", "item")
    }
    if not allowed:
        _refuse_cold(db, logs, cold)
    before = count_rows(db)
    replace_table(db, "rows", f"SELECT * FROM rows WHERE NOT ({' OR '.join(cold.values())})")
    db.execute("DROP TABLE warm")
    return before - count_rows(db)


def _refuse_cold(db: Database, logs: list[Log], cold: dict[str, str]) -> None:
    for side, condition in cold.items():
        bad = db.execute(
            f'SELECT file, line, id FROM rows JOIN {side}s ON code = "{side}" '
            f"WHERE {condition} ORDER BY file, line LIMIT 1"
        ).fetchall()
        for file, line, name in bad:
            raise UserError(
                f"{location(logs[file], line)}: {side} {name} is not in train; "
                "--unknown drop leaves such rows out"
            )


def protect(db: Database) -> None:
    """Mark the first row of every train user and item, so that no cut takes its last row.

    The first row is the earliest one; a hash breaks ties and decides in a log without time.
    """
    # One number holds time and hash, since an aggregate of numbers is far cheaper than a window.
    age = f'coalesce("timestamp", 0)::HUGEINT * {2**64}::HUGEINT + ({draw("protect")})'
    marked = f"""
        WITH aged AS (SELECT "user", item, {age} AS age FROM rows WHERE split = 0),
             of_user AS (SELECT "user", min(age) AS first FROM aged GROUP BY "user"),
             of_item AS (SELECT item, min(age) AS first FROM aged GROUP BY item)
        SELECT rows.* REPLACE (
            kept OR split = 0 AND {age} IN (of_user.first, of_item.first) AS kept)
        FROM rows JOIN of_user USING ("user") JOIN of_item USING (item)
    """
    replace_table(db, "rows", marked)


def cut(db: Database, split: str, shift: str, fraction: float, users: int | None = None) -> None:
    """Move the train rows that come first in the shift's order to ``split``; kept rows stay.

    The fraction and the items' degrees count the train rows of the first ``users`` users, or of
    all users. All rows of the other users must be kept.
    """
    counted = "true" if users is None else f'"user" < {users}'
    rows = scalar(db, f"SELECT count(*) FROM rows WHERE split = 0 AND {counted}")
    db.execute(f"""
        CREATE TEMP TABLE taken AS SELECT "user", item
        FROM rows JOIN (SELECT item, count(*) AS degree FROM rows WHERE split = 0 AND {counted}
                        GROUP BY item) USING (item)
        WHERE split = 0 AND NOT kept
        ORDER BY {order(shift, split)}, "user", item
        LIMIT {share(rows, fraction)}
    """)
    moved = f"""
        SELECT rows.* REPLACE (
            CASE WHEN taken.item IS NULL THEN split ELSE {SPLITS.index(split)} END AS split)
        FROM rows LEFT JOIN taken
            ON split = 0 AND taken."user" = rows."user" AND taken.item = rows.item
    """
    replace_table(db, "rows", moved)
    db.execute("DROP TABLE taken")
