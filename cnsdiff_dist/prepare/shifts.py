"""The out-of-distribution splits, as orders over a log: pure functions.

A shift is an order: the rows of the log that come first in it are the shifted test set.
An order is a SQL expression over the columns ``key`` (random bits), ``timestamp`` and
``degree`` (interactions of the item in the part being cut), so that the sort runs out of core.
"""

import hashlib

SHIFTS = ("popularity", "temporal", "exposure", "random")


def key(seed: int) -> str:
    """64 random bits of a row, computed once and stored as the column ``key``.

    They depend on nothing but the seed, the user and the item: not on threads, not on the
    order of the rows.
    """
    return f"md5_number_lower(concat('{seed}:', \"user\", ':', item))"


def draw(tag: str) -> str:
    """The row's random bits for one purpose: each half of its key times an odd number of the tag.

    Far cheaper than hashing the row again. Between rows draws are as independent as keys.
    """
    digest = hashlib.sha256(tag.encode()).digest()
    high, low = (int.from_bytes(digest[at : at + 4], "little") | 1 for at in (0, 4))
    mask = f"{2**32 - 1}::UBIGINT"
    return (
        f"(((key >> 32) * {high}::UBIGINT) & {mask}) * {2**32}::UBIGINT "
        f"+ (((key & {mask}) * {low}::UBIGINT) & {mask})"
    )


def uniform(tag: str) -> str:
    """The same as a number in (0, 1]."""
    return f"(({draw(tag)} + 0.5) / 2.0**64)"


def order(shift: str, tag: str) -> str:
    """The SQL order of a shift.

    - ``random``: any row is as likely as another.
    - ``popularity`` and ``exposure``: rows drawn with probability proportional to 1 / degree,
      without replacement (Efraimidis & Spirakis 2006: ascending -ln(u) / weight), so every
      item is about equally present. For ``exposure`` it imitates a uniform exposure.
    - ``temporal``: the latest rows; ties are broken at random.
    """
    if shift == "temporal":
        return f'"timestamp" DESC, {uniform(tag)}'
    if shift in ("popularity", "exposure"):
        return f"-ln({uniform(tag)}) * degree"
    return uniform(tag)


def share(rows: int, fraction: float) -> int:
    """How many of ``rows`` a ``fraction`` takes, rounded; never all of them."""
    return min(round(rows * fraction), max(rows - 1, 0))
