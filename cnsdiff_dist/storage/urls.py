"""What a URL says, without opening it."""

import re
from pathlib import Path, PurePosixPath

from fsspec.utils import get_protocol

from cnsdiff_dist.errors import UserError


def protocol(url: str) -> str:
    """Return the URL's scheme, or ``file`` for a plain path."""
    name = get_protocol(url)
    return "file" if name == "local" else name


def is_local(url: str) -> bool:
    return protocol(url) == "file"


def local_path(url: str) -> Path:
    """Return the path of a local URL (``file://`` or a plain path)."""
    return Path(re.sub(r"^(file|local):(//)?", "", url)).expanduser()


def display(url: str) -> str:
    """Return the URL without ``user:password@``, query and fragment, so that it may be shown."""
    if is_local(url):
        return str(local_path(url))
    return "::".join(_without_secrets(part) for part in url.split("::"))


def _without_secrets(url: str) -> str:
    scheme, mark, rest = re.split(r"[?#]", url, maxsplit=1)[0].rpartition("://")
    head, at, tail = rest.rpartition("@")
    # Not every @ ends a password: abfs://container@account has none, and in http://host:80/a@b
    # the text before the @ is a host, its port and a part of the path.
    user_info = head.partition("/")[0]
    if at and ":" in head and not (":" in user_info and user_info.rpartition(":")[2].isdigit()):
        rest = tail
    return f"{scheme}{mark}{rest}"


def refuse_secrets(url: str) -> None:
    """Refuse a URL that must not be saved: one with ``user:password@`` or a query.

    Tokens travel in queries.

    Raises:
        UserError: the URL has either.
    """
    if display(url) != url and not is_local(url):
        raise UserError(
            f"{display(url)}: a URL with credentials or a query would be saved with the run; "
            "give credentials by the environment or a profile"
        )


def join(url: str, relative: str) -> str:
    """Return the URL of the path ``relative`` under the directory ``url``.

    Raises:
        UserError: ``relative`` is absolute or climbs out of ``url``.
    """
    parts = PurePosixPath(relative).parts
    if not parts or relative.startswith("/") or ".." in parts or "://" in relative:
        raise UserError(f"{display(url)}: {relative!r} is not a path inside this directory")
    return f"{url.rstrip('/')}/{'/'.join(parts)}"
