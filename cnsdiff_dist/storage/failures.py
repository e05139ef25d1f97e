"""From an exception that storage raises to one line that a user can act on."""

import errno
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from cnsdiff_dist.errors import TryAgain, UserError
from cnsdiff_dist.storage.urls import display, is_local, protocol

# Every client has classes of its own for the same few causes. They are compared by name, because
# a client may not be installed.
_TRANSIENT = (
    {"ConnectionError", "TimeoutError", "IncompleteRead"}  # Python
    | {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"}  # botocore
    | {"ConnectionClosedError", "HTTPClientError", "ResponseParserError"}  # botocore
    | {"ClientConnectorError", "ClientPayloadError"}  # aiohttp
    | {"ServerTimeoutError", "ServerDisconnectedError"}  # aiohttp
    | {"FSTimeoutError", "ServiceUnavailable"}  # fsspec, google
)
_TRANSIENT_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_NO_CREDENTIALS = (
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}  # botocore
    | {"TokenRetrievalError", "ProfileNotFound"}  # botocore
    | {"DefaultCredentialsError"}  # google
)
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs", "requests")
_DECOMPRESSION = (EOFError, zlib.error, lzma.LZMAError)
_NO_SPACE = "no space left; free some or write elsewhere"
_REASONS = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EROFS: "read-only file system; write elsewhere",
}


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later, because the network or the server failed."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    return _is_named(error, _TRANSIENT) or getattr(error, "errno", None) in _TRANSIENT_ERRNO


def explain(error: BaseException, url: str, action: str) -> UserError:
    """Return the one line to show for an error.

    ``action`` is the verb of what failed: "cannot ``action``".
    """
    if isinstance(error, UserError):
        return error
    kind = TryAgain if _is_silent_host(error, url) else UserError
    return kind(f"{display(url)}: cannot {action}: {_reason(error, url)}")


@contextmanager
def explained(url: str, action: str) -> Iterator[None]:
    """Turn a failure of storage inside the block into a UserError, and let bugs pass.

    Raises:
        UserError: see :func:`explain`.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ImportError, ValueError, *_DECOMPRESSION) as error:
        raise explain(error, url, action) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in _CLIENTS:
            raise explain(error, url, action) from error
        raise


def _is_named(error: BaseException, names: set[str]) -> bool:
    """Whether the class of the error, or a base of it, has one of these names."""
    return any(base.__name__ in names for base in type(error).__mro__)


def _is_silent_host(error: BaseException, url: str) -> bool:
    lacks_credentials = _is_named(error, _NO_CREDENTIALS)
    return is_transient(error) and not is_local(url) and not lacks_credentials


def _reason(error: BaseException, url: str) -> str:
    """Say what went wrong and what to do."""
    if _is_named(error, _NO_CREDENTIALS):
        return (
            f"no credentials; set them for {protocol(url)} "
            "(for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    if _is_silent_host(error, url):
        return (
            "the host does not answer; check the URL, the network and the endpoint "
            "(for s3: AWS_ENDPOINT_URL)"
        )
    if isinstance(error, FileNotFoundError):
        return "no such file or directory; check the path"
    code = getattr(error, "errno", None)
    if code in _REASONS:
        return _REASONS[code]
    if isinstance(error, PermissionError):
        return "permission denied; check rights and keys"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file is in the way; choose another path"
    if isinstance(error, ValueError) and "rotocol" in str(error):
        return (
            f"unknown protocol {protocol(url)!r}; use a path, s3://, gs://, or another one that "
            "fsspec knows"
        )
    return _text(error, url)


def _text(error: BaseException, url: str) -> str:
    """Return the error's text on one line, without the secrets of ``url`` or another URL."""
    text = " ".join(str(error).split()) or type(error).__name__
    for part in map(urlsplit, url.split("::")):
        login = part.netloc.rpartition("@")[0]
        for secret in (f"{login}@", login.partition(":")[2], f"?{part.query}", part.query):
            if secret.strip("?@"):
                text = text.replace(secret, "")
    return re.sub(r"://[^/@\s]+@", "://", text)[:300]
