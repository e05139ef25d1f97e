"""Which shared table row serves a user who is not in the id map."""

import hashlib

from cnsdiff_dist.data.schema import Manifest


def hashed_row(raw: str, manifest: Manifest) -> int:
    """Return the shared row of the user with raw id ``raw``.

    The last N = ``manifest.hashed_users`` rows are shared; their raw ids are -1, -2, .., -N in
    this order. With h the first 8 hexadecimal digits of the MD5 of the raw id's text, modulo N,
    the user has the row of raw id -1 - h. ``prepare/hashed_users.py`` computes the same in SQL: a
    change here is a change there, and datasets that were prepared before no longer fit.
    """
    digest = hashlib.md5(raw.encode(), usedforsecurity=False).hexdigest()
    shared = manifest.hashed_users
    return manifest.users - shared + int(digest[:8], 16) % shared
