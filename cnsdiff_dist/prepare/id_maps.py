"""From raw ids to codes and then to table rows.

A code numbers every id of the logs, so that the stages of ``prepare`` sort and join integers. A
table row numbers the ids that are left in train. Both follow the order of the raw ids.
"""

from cnsdiff_dist.prepare.database import Database, replace_table, scalar

SIDES = {"users": "user", "items": "item"}
"""The id table of each side, and the column of ``rows`` that refers to it."""


def assign_codes(db: Database) -> None:
    """Turn ``raw`` into ``coded``, with codes for ids, and fill the tables ``users`` and ``items``.

    Ids sort as numbers if all ids of their side are integers, else as text (by UTF-8 bytes).
    """
    for table, side in SIDES.items():
        _sort_ids(db, table, side)
        replace_table(db, table, f"SELECT id, rowid AS code FROM {table}")
    db.execute("""
        CREATE TABLE coded AS
        SELECT split, file, line, users.code AS "user", items.code AS item, rating, "timestamp"
        FROM raw JOIN users ON users.id::VARCHAR = "user" JOIN items ON items.id::VARCHAR = item
    """)
    db.execute("DROP TABLE raw")


def _sort_ids(db: Database, table: str, side: str) -> None:
    # Casting there and back tells integers from text such as '007'.
    numeric = scalar(
        db,
        f'SELECT bool_and(TRY_CAST("{side}" AS BIGINT)::VARCHAR IS NOT DISTINCT FROM "{side}") '
        "FROM raw",
    )
    id_type = "BIGINT" if numeric else "VARCHAR"
    db.execute(
        f'CREATE TABLE {table} AS SELECT DISTINCT "{side}"::{id_type} AS id FROM raw ORDER BY id'
    )


def assign_rows(db: Database) -> int:
    """Give the users and items of train their table rows, and put them into ``rows``.

    Returns:
        The number of users in train.
    """
    for table, side in SIDES.items():
        replace_table(
            db,
            table,
            f"SELECT id, code FROM {table} "
            f'WHERE code IN (SELECT "{side}" FROM rows WHERE split = 0) ORDER BY code',
        )
        replace_table(db, table, f"SELECT id, code, rowid AS row FROM {table}")
    numbered = """
        SELECT rows.* REPLACE (users.row AS "user", items.row AS item)
        FROM rows JOIN users ON users.code = "user" JOIN items ON items.code = item
    """
    replace_table(db, "rows", numbered)
    return scalar(db, "SELECT count(*) FROM users")
