"""Users that share table rows: the rare ones of train, and those that nobody has seen yet.

A user with few interactions hardly moves a row of its own, and one that comes later has none.
With ``--hashed-users N`` the users of train with fewer than K rows share N rows, by a hash of
their raw id; the N rows are users like any other, with raw ids -1 .. -N, so the id map stays one
line per row. Whoever is not in the map is served by the row that its hash names.

Items do not share rows: a list of items needs the raw id of each.
"""

import hashlib

from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.splits import Database, count


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
        UserError: a user has the id of a shared row, nobody would share one of them, or everybody
            one.
    """
    ((users, first),) = db.execute("SELECT count(*), max(code) + 1 FROM users").fetchall()
    if rows > users:
        raise UserError(f"--hashed-users {rows}: there are only {users} users; take fewer")
    db.execute(f"""
        CREATE TEMP TABLE judged AS
        SELECT code, ('0x' || left(md5(id::VARCHAR), 8))::BIGINT AS digest, rare
        FROM users JOIN (SELECT "user" AS code, count(*) < {below} AS rare
                         FROM rows WHERE split = 0 GROUP BY "user") USING (code)
    """)
    _refuse(db, rows, below)
    db.execute(
        f"CREATE TEMP TABLE rare AS SELECT code, digest % {rows} AS hash FROM judged WHERE rare"
    )
    db.execute("DROP TABLE judged")
    db.execute(f"INSERT INTO users SELECT -1 - h, {first} + h FROM range({rows}) AS shared(h)")
    before = count(db)
    db.execute(f"""
        CREATE TABLE shared AS
        SELECT rows.* FROM rows WHERE "user" NOT IN (SELECT code FROM rare)
        UNION ALL
        SELECT rows.* REPLACE ({first} + hash AS "user", true AS kept)
        FROM rows JOIN rare ON code = "user" WHERE split = 0
        QUALIFY row_number() OVER (PARTITION BY hash, item ORDER BY file, line) = 1
    """)
    db.execute("DROP TABLE rows; DROP TABLE rare; ALTER TABLE shared RENAME TO rows")
    return before - count(db)


def _refuse(db: Database, rows: int, below: int) -> None:
    (found,) = db.execute(f"""
        SELECT count(*), count(*) FILTER (rare), count(DISTINCT digest % {rows}) FILTER (rare)
        FROM judged
    """).fetchall()
    users, rare, used = found
    taken = db.execute(f"""
        SELECT id FROM users
        WHERE id::VARCHAR IN (SELECT (-1 - h)::VARCHAR FROM range({rows}) AS shared(h)) LIMIT 1
    """).fetchall()
    for (name,) in taken:
        raise UserError(
            f"--hashed-users {rows}: there is a user {name}, and -1 .. -{rows} are the ids of the "
            "shared rows; rename it"
        )
    if rare == users:
        raise UserError(f"--hashed-below {below}: no user has as many train rows; lower it")
    if used < rows:
        raise UserError(
            f"--hashed-users {rows}: the {rare} users with fewer than {below} train rows fill "
            f"only {used} of them; {_enough(db, rows)}raise --hashed-below"
        )


def _enough(db: Database, rows: int) -> str:
    """A number of rows that the rare users would fill, in words."""
    while rows := rows // 2:
        ((used,),) = db.execute(
            f"SELECT count(DISTINCT digest % {rows}) FROM judged WHERE rare"
        ).fetchall()
        if used == rows:
            return f"take {rows}, or "
    return ""
