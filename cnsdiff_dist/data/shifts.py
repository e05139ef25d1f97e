"""The out-of-distribution splits, as orders over a log: pure functions.

A shift is an order: the rows of the log that come first in it are the shifted test set.
An order is a SQL expression over the columns ``user`` and ``item`` (integers),
``timestamp`` and ``degree`` (interactions of the item in the part being cut), so that the
sort runs out of core.
"""

SHIFTS = ("popularity", "temporal", "exposure", "random")


def hashed(seed: int, tag: str) -> str:
    """64 random bits that depend on nothing but the row, the seed and the tag.

    They do not depend on threads, on the order of the rows or on the other rows.
    """
    return f"md5_number_lower(concat('{seed}:{tag}:', \"user\", ':', item))"


def uniform(seed: int, tag: str) -> str:
    """The same bits as a number in (0, 1]."""
    return f"(({hashed(seed, tag)} + 0.5) / 2.0**64)"


def order(shift: str, seed: int, tag: str) -> str:
    """The SQL order of a shift.

    - ``random``: any row is as likely as another.
    - ``popularity`` and ``exposure``: rows drawn with probability proportional to 1 / degree,
      without replacement (Efraimidis & Spirakis 2006: ascending -ln(u) / weight), so every
      item is about equally present. For ``exposure`` it imitates a uniform exposure.
    - ``temporal``: the latest rows; ties are broken at random.
    """
    if shift == "temporal":
        return f'"timestamp" DESC, {uniform(seed, tag)}'
    if shift in ("popularity", "exposure"):
        return f"-ln({uniform(seed, tag)}) * degree"
    return uniform(seed, tag)


def share(rows: int, fraction: float) -> int:
    """How many of ``rows`` a ``fraction`` takes, rounded; never all of them."""
    return min(round(rows * fraction), max(rows - 1, 0))
