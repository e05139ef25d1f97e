"""Users that share table rows: the rare ones of train, and those that nobody has seen yet.

A user with few interactions hardly moves a row of its own, and one that comes later has none.
With ``--hashed-users N`` the users of train with fewer than K rows share N rows, by a hash of
their raw id; the N rows are users like any other, with raw ids -1 .. -N, so the id map stays one
line per row. Whoever is not in the map is served by the row that its hash names.

Items do not share rows: a list of items needs the raw id of each.
"""

import hashlib

import duckdb

from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.errors import UserError

Database = duckdb.DuckDBPyConnection


def hashed_row(raw: str, manifest: Manifest) -> int:
    """The shared row of a user who is not in the id map.

    With h the first 8 hexadecimal digits of the MD5 of the raw id's text, modulo N, it is the row
    of raw id -1 - h, and the shared rows are the last N. Any SQL engine can say the same.
    """
    digest = hashlib.md5(raw.encode(), usedforsecurity=False).hexdigest()
    rows = manifest.hashed_users
    return manifest.users - rows + int(digest[:8], 16) % rows


def share_rows(db: Database, rows: int, below: int) -> int:
    """In ``rows`` of ``prepare``, give the users with fewer than ``below`` train rows a shared one.

    Their rows of other splits go, since nobody of them has a list of their own to be judged, and
    so does what a shared row has twice; no cut takes train rows of a shared one away.

    Returns:
        the number of rows that went.

    Raises:
        UserError: a user has the id of a shared row, or no user would share one of them.
    """
    taken = db.execute(
        "SELECT id FROM users WHERE TRY_CAST(id AS BIGINT) BETWEEN ? AND -1 LIMIT 1", [-rows]
    ).fetchall()
    for (name,) in taken:
        raise UserError(
            f"--hashed-users {rows}: there is a user {name}, and -1 .. -{rows} are the ids of the "
            "shared rows; rename it"
        )
    ((first,),) = db.execute("SELECT max(code) + 1 FROM users").fetchall()
    db.execute(f"""
        CREATE TEMP TABLE rare AS
        SELECT code, ('0x' || left(md5(id::VARCHAR), 8))::BIGINT % {rows} AS hash
        FROM users JOIN (SELECT "user" AS code FROM rows WHERE split = 0
                         GROUP BY "user" HAVING count(*) < {below}) USING (code)
    """)
    ((users, used),) = db.execute("SELECT count(*), count(DISTINCT hash) FROM rare").fetchall()
    if used < rows:
        raise UserError(
            f"--hashed-users {rows}: the {users} users with fewer than {below} train rows fill "
            f"only {used} of them; take fewer, or raise --hashed-below"
        )
    db.execute(f"INSERT INTO users SELECT -1 - h, {first} + h FROM range({rows}) AS shared(h)")
    ((before,),) = db.execute("SELECT count(*) FROM rows").fetchall()
    db.execute(f"""
        CREATE TABLE shared AS
        SELECT rows.* FROM rows WHERE "user" NOT IN (SELECT code FROM rare)
        UNION ALL
        SELECT rows.* REPLACE ({first} + hash AS "user", true AS kept)
        FROM rows JOIN rare ON code = "user" WHERE split = 0
        QUALIFY row_number() OVER (PARTITION BY hash, item ORDER BY file, line) = 1
    """)
    db.execute("DROP TABLE rows; DROP TABLE rare; ALTER TABLE shared RENAME TO rows")
    ((after,),) = db.execute("SELECT count(*) FROM rows").fetchall()
    return int(before - after)
