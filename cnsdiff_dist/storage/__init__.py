"""Files at any fsspec URL. Only this package opens a URL.

A plain path or ``file://`` is a local file. Any other scheme (``s3://``, ``gs://``,
``memory://``) goes through fsspec. A failure outside this program (no such file, no permission,
no credentials, a full disk, an unreachable host) becomes one :class:`UserError` line that names
the URL, without its secrets, and what to do.
"""

from cnsdiff_dist.storage.failures import explain, explained, is_transient
from cnsdiff_dist.storage.files import (
    delete_tree,
    exists,
    filesystem,
    glob,
    is_link,
    list_files,
    open_read,
    open_write,
    read_bytes,
    read_range,
    read_text,
    replacing,
    size,
    upload,
    write_bytes,
    write_json,
    write_text,
)
from cnsdiff_dist.storage.retries import patience, patient, retrying
from cnsdiff_dist.storage.urls import display, is_local, join, local_path, protocol, refuse_secrets

__all__ = [
    "delete_tree",
    "display",
    "exists",
    "explain",
    "explained",
    "filesystem",
    "glob",
    "is_link",
    "is_local",
    "is_transient",
    "join",
    "list_files",
    "local_path",
    "open_read",
    "open_write",
    "patience",
    "patient",
    "protocol",
    "read_bytes",
    "read_range",
    "read_text",
    "refuse_secrets",
    "replacing",
    "retrying",
    "size",
    "upload",
    "write_bytes",
    "write_json",
    "write_text",
]
