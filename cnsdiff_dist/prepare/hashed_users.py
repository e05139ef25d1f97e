"""Let the rare users of train share table rows.

A user with few interactions hardly moves a row of its own, and a user who comes later has no row.
With ``--hashed-users N --hashed-below K`` the users with fewer than K train rows share N table
rows by a hash of their raw id. The shared rows are users like any other, with raw ids -1 .. -N, so
the id map stays one line per table row. ``data.hashed_users.hashed_row`` finds the row of a user
who is not in the map.

Items do not share rows, because a list of recommendations needs the raw id of each item.
"""

from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.database import Database, count_rows, replace_table, scalar


def share_rows(db: Database, shared: int, below: int) -> int:
    """Replace the users with fewer than ``below`` train rows by ``shared`` new users in ``rows``.

    The rare users' rows outside train are dropped, since they have no list of their own to
    evaluate. An item that several of them share stays once. No cut takes a train row of a new user.

    Returns:
        The number of dropped rows.

    Raises:
        UserError: a user has the id of a shared row, a shared row would have no users, or every
            user would share one.
    """
    users = scalar(db, "SELECT count(*) FROM users")
    if shared > users:
        raise UserError(f"--hashed-users {shared}: there are only {users} users; take fewer")
    first_code = scalar(db, "SELECT max(code) + 1 FROM users")
    _judge(db, below)
    _refuse_taken_ids(db, shared)
    _refuse_empty_rows(db, shared, below)
    db.execute(
        f"INSERT INTO users SELECT -1 - h, {first_code} + h FROM range({shared}) AS shared(h)"
    )
    before = count_rows(db)
    merged = f"""
        SELECT rows.* FROM rows WHERE "user" NOT IN (SELECT code FROM judged WHERE rare)
        UNION ALL
        SELECT rows.* REPLACE ({first_code} + digest % {shared} AS "user", true AS kept)
        FROM rows JOIN judged ON code = "user" WHERE rare AND split = 0
        QUALIFY row_number() OVER (PARTITION BY digest % {shared}, item ORDER BY file, line) = 1
    """
    replace_table(db, "rows", merged)
    db.execute("DROP TABLE judged")
    return before - count_rows(db)


def _judge(db: Database, below: int) -> None:
    """Make ``judged``: of every user of train the hash, and whether it is rare."""
    db.execute(f"""
        CREATE TEMP TABLE judged AS
        SELECT code, ('0x' || left(md5(id::VARCHAR), 8))::BIGINT AS digest, rare
        FROM users JOIN (SELECT "user" AS code, count(*) < {below} AS rare
                         FROM rows WHERE split = 0 GROUP BY "user") USING (code)
    """)


def _refuse_taken_ids(db: Database, shared: int) -> None:
    taken = db.execute(f"""
        SELECT id FROM users
        WHERE id::VARCHAR IN (SELECT (-1 - h)::VARCHAR FROM range({shared}) AS shared(h)) LIMIT 1
    """).fetchall()
    for (name,) in taken:
        raise UserError(
            f"--hashed-users {shared}: there is a user {name}, and -1 .. -{shared} are the ids of "
            "the shared rows; rename it"
        )


def _refuse_empty_rows(db: Database, shared: int, below: int) -> None:
    """Refuse options that leave no user a table row alone, or a shared row without users."""
    ((users, rare),) = db.execute("SELECT count(*), count(*) FILTER (rare) FROM judged").fetchall()
    if rare == users:
        raise UserError(f"--hashed-below {below}: no user has as many train rows; lower it")
    filled = _filled(db, shared)
    if filled < shared:
        raise UserError(
            f"--hashed-users {shared}: the {rare} users with fewer than {below} train rows fill "
            f"only {filled} of them; {_suggestion(db, shared)}raise --hashed-below"
        )


def _filled(db: Database, shared: int) -> int:
    """Count the rows that are not empty if the rare users share ``shared`` rows."""
    return scalar(db, f"SELECT count(DISTINCT digest % {shared}) FROM judged WHERE rare")


def _suggestion(db: Database, shared: int) -> str:
    """Suggest a number of rows, by halving, that the rare users would fill."""
    while shared := shared // 2:
        if _filled(db, shared) == shared:
            return f"take {shared}, or "
    return ""
