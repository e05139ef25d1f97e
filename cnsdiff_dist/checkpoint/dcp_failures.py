"""From an exception of torch.distributed.checkpoint (DCP) to one UserError line."""

import errno
import logging
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint import CheckpointException

from cnsdiff_dist import storage
from cnsdiff_dist.distributed.world import is_lost_peer
from cnsdiff_dist.errors import UserError

_WRITE_FAILURES = (OSError, ValueError, RuntimeError)
# A hostile checkpoint makes torch, pickle and zipfile raise the others.
_READ_FAILURES = (
    *_WRITE_FAILURES,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    TypeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


@contextmanager
def explained_dcp(url: str, action: str) -> Iterator[None]:
    """Quiet DCP's planner, and turn a failure of DCP inside the block into a UserError.

    ``action`` is "read" or "write". A lost peer passes, because the heartbeat names its rank, and
    so does a bug of this program while it writes.

    Raises:
        UserError: the cause of the first rank that failed.
    """
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            line = _explain(cause, url, action)
            raise type(line)(f"{line} (rank {rank})") from cause
        except _READ_FAILURES as error:
            is_bug = action == "write" and not isinstance(error, _WRITE_FAILURES)
            if is_bug or is_lost_peer(error):
                raise
            raise _explain(error, url, action) from error


def _explain(error: BaseException, url: str, action: str) -> UserError:
    if action == "write" and "unexpected pos" in str(error):
        error = OSError(errno.ENOSPC, "")  # torch's writer reports a short write in these words
    return storage.explain(error, url, action)


def root_cause(error: BaseException) -> BaseException:
    """Return the exception from which :func:`explained_dcp` made this one."""
    return error.__cause__ or error
