"""Build a dataset in a staging directory and publish it all at once."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import MANIFEST
from cnsdiff_dist.data.schema import SPLITS
from cnsdiff_dist.errors import UserError

_FOLDERS = (*SPLITS, "ids", "graph", "truth")
_STAGING = ".staging-"
# A marker that lies in OUT while it is written: the files beside it are an unfinished dataset.
_PUBLISHING = f"{_STAGING}publishing"


def check_output(out: str, overwrite: bool) -> None:
    """Check before the work whether ``out`` can be written.

    Raises:
        UserError: ``out`` is a dataset that may not be replaced, holds other files, or is remote
            and does not accept a file.
    """
    names = storage.list_files(out)
    if MANIFEST in names:
        if not overwrite:
            raise UserError(f"{storage.display(out)}: a dataset is here; --overwrite replaces it")
        _refuse_foreign_files(out)
    elif _PUBLISHING not in names and any(not name.startswith(_STAGING) for name in names):
        raise UserError(
            f"{storage.display(out)}: not empty, and not a dataset; choose another directory"
        )
    if not storage.is_local(out):
        probe = storage.join(out, f"{_STAGING}probe")
        storage.write_bytes(probe, b"-")
        storage.delete_tree(probe)


def _refuse_foreign_files(out: str) -> None:
    """Refuse files of the user in the dataset's folders, which replacing it deletes."""
    try:
        # Plain JSON, since the dataset may be of an older schema version.
        manifest = json.loads(storage.read_text(storage.join(out, MANIFEST)))
    except ValueError:
        manifest = {}
    listed = set(_paths(manifest))
    for name in storage.list_files(out):
        folder = name.partition("/")[0]
        if folder in _FOLDERS and folder != "truth" and name not in listed:
            raise UserError(
                f"{storage.display(out)}/{name}: not of the dataset there, which --overwrite "
                "would delete; move it away"
            )


def _paths(tree: Any) -> Iterator[str]:
    """Yield every ``path`` in a manifest."""
    if isinstance(tree, dict) and isinstance(tree.get("path"), str):
        yield tree["path"]
    elif isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _paths(branch)


@contextmanager
def staging(out: str) -> Iterator[Path]:
    """Make a local staging directory, and remove it at the end whatever happens.

    For a local ``out`` it lies inside ``out``, so that publishing renames within one disk; for a
    remote one it lies where ``TMPDIR`` says.

    Raises:
        UserError: the directory cannot be made.
    """
    target = storage.local_path(out) if storage.is_local(out) else None
    created = target is not None and not target.exists()
    with storage.explained(out if target else tempfile.gettempdir(), "write"):
        if target:
            target.mkdir(parents=True, exist_ok=True)
            for leftover in target.glob(f"{_STAGING}*"):  # of a killed run
                shutil.rmtree(leftover, ignore_errors=True)
        directory = Path(tempfile.mkdtemp(prefix=_STAGING, dir=target))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if target and created:
            with suppress(OSError):
                target.rmdir()  # Succeeds only if nothing was published.


def publish(built: Path, out: str) -> None:
    """Move the dataset in ``built`` to ``out``, with ``manifest.json`` last.

    On failure ``out`` has no manifest, so it is not a dataset. The next ``prepare`` replaces what
    a killed one leaves.

    Raises:
        UserError: ``out`` cannot be written.
    """
    storage.write_bytes(storage.join(out, _PUBLISHING), b"-")
    for name in (MANIFEST, *_FOLDERS):
        storage.delete_tree(storage.join(out, name))
    begun = []
    try:
        for name in [*sorted(set(os.listdir(built)) - {MANIFEST}), MANIFEST]:
            begun.append(name)
            _move(built / name, storage.join(out, name))
    except BaseException:
        for name in [*reversed(begun), _PUBLISHING]:
            with suppress(UserError):
                storage.delete_tree(storage.join(out, name))
        raise
    storage.delete_tree(storage.join(out, _PUBLISHING))


def _move(source: Path, target: str) -> None:
    if storage.is_local(target):
        with storage.explained(target, "write"):
            os.replace(source, storage.local_path(target))
    elif source.is_file():
        storage.upload(source, target)
    else:
        for name in sorted(os.listdir(source)):
            _move(source / name, storage.join(target, name))
