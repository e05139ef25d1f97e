"""The out-of-distribution splits, as orders over a log: pure functions that return SQL.

A shift is an order: the rows that come first in it become the shifted test set. An order is a SQL
expression over the columns ``key`` (random bits), ``timestamp`` and ``degree`` (the item's number
of rows in the part that is cut), so that DuckDB can sort out of core.
"""

import hashlib

SHIFTS = ("popularity", "temporal", "exposure", "random")


def key(seed: int) -> str:
    """Return SQL for 64 random bits of a row, which are stored as the column ``key``.

    They depend on the seed, the user and the item alone, not on threads or the order of the rows.
    """
    return f"md5_number_lower(concat('{seed}:', \"user\", ':', item))"


def draw(tag: str) -> str:
    """Return SQL for 64 random bits of a row for the purpose ``tag``.

    Each half of the row's key is multiplied by an odd number that depends on the tag, which is
    far cheaper than to hash the row again. Draws of different rows are as independent as the keys.
    """
    digest = hashlib.sha256(tag.encode()).digest()
    high, low = (int.from_bytes(digest[at : at + 4], "little") | 1 for at in (0, 4))
    mask = f"{2**32 - 1}::UBIGINT"
    return (
        f"(((key >> 32) * {high}::UBIGINT) & {mask}) * {2**32}::UBIGINT "
        f"+ (((key & {mask}) * {low}::UBIGINT) & {mask})"
    )


def uniform(tag: str) -> str:
    """Return SQL for the same draw as a number in (0, 1]."""
    return f"(({draw(tag)} + 0.5) / 2.0**64)"


def order(shift: str, tag: str) -> str:
    """Return the SQL order of a shift.

    - ``random``: all rows are equally likely to come first.
    - ``popularity`` and ``exposure``: rows are drawn without replacement, with probability
      proportional to 1 / degree (Efraimidis & Spirakis 2006: ascending -ln(u) / weight), so that
      all items are about equally frequent. For ``exposure`` this imitates a uniform exposure.
    - ``temporal``: the latest rows come first; ties are broken at random.
    """
    if shift == "temporal":
        return f'"timestamp" DESC, {uniform(tag)}'
    if shift in ("popularity", "exposure"):
        return f"-ln({uniform(tag)}) * degree"
    return uniform(tag)


def share(rows: int, fraction: float) -> int:
    """Return how many of ``rows`` a ``fraction`` takes, rounded, and never all of them."""
    return min(round(rows * fraction), max(rows - 1, 0))
