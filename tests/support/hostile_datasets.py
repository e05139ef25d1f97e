"""Datasets that were changed, read case after case in a process of its own.

The process may crash, run out of memory or open what it must not, so `python -m
tests.support.hostile_datasets` prints a line for each case.
"""

import copy
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist.data.dataset import load_manifest, read_ids, read_split
from cnsdiff_dist.data.epoch_plan import EpochPlan
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.data.schema import Manifest, leading_bytes
from cnsdiff_dist.data.stream import TrainStream
from cnsdiff_dist.errors import UserError
from tests.support.mutating import manifest_text, mutated

REFUSED = "refused"
SHARDS = {"train": "train", "valid_ood": "valid_ood", "users": "ids/users"}
_ROOM = 3 << 30


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or REFUSED where it raises a UserError of one line."""
    try:
        return call()
    except UserError as error:
        line = str(error)
        assert line and len(line.splitlines()) == 1, f"not one line: {line!r}"
        assert len(line) < 2_000, f"a line of {len(line)} characters: {line[:200]!r}"
        return REFUSED


def shard_of(tree: Any, part: str) -> Any:
    """The first shard of a split or id map in a manifest's tree."""
    split = tree["splits"][part] if part in tree["splits"] else tree["ids"][part]
    return split["shards"][0]


def reseal(tree: Any, part: str, content: bytes, follow: bool) -> None:
    """Make a manifest fit the changed content of a shard, as an attacker would.

    Args:
        follow: take the numbers of rows from the new footer too.
    """
    shard = shard_of(tree, part)
    size = min(int.from_bytes(content[-8:-4], "little") + 8, len(content))
    footer = content[len(content) - size :]
    shard.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    shard.update(footer_bytes=size, footer_crc32=zlib.crc32(footer))
    try:
        found = pq.read_metadata(pa.BufferReader(footer))
        groups = range(found.num_row_groups)
        crc32 = [zlib.crc32(content[slice(*leading_bytes(found, n))]) for n in groups]
        rows = [found.row_group(n).num_rows for n in groups]
    except Exception:  # no Parquet any more: nothing to promise
        return
    if follow:
        shard.update(row_group_crc32=crc32, row_groups=rows, rows=sum(rows))
        (tree["splits"].get(part) or tree["ids"][part])["rows"] = sum(rows)
    elif len(rows) == len(shard["row_groups"]):
        shard["row_group_crc32"] = crc32


def read(url: str, part: str) -> Any:
    """Read one part of a dataset as training or evaluation does."""
    manifest = load_manifest(url)
    if part == "users":
        return read_ids(url, manifest, "users").to_pydict()
    if part != "train":
        return _legal(manifest, *read_split(url, manifest, part))
    return _legal(manifest, *_train_rows(url, manifest, None))


def _train_rows(url: str, manifest: Manifest, steps: int | None) -> Iterator[Any]:
    plan = EpochPlan(manifest.train.rows, batch=440, streams=4, block_rows=300, seed=1)
    stream = TrainStream(url, manifest, plan, [0, 1, 2, 3], 2).batches(0)
    batches = list(islice(stream, steps))
    if steps is None:
        assert sum(batch.valid_rows for batch in batches) == manifest.train.rows
    return (np.concatenate([getattr(b, side) for b in batches]) for side in _SIDES)


_SIDES = ("users", "items")


def _legal(manifest: Any, users: Any, items: Any) -> Any:
    for ids, limit in ((users, manifest.users), (items, manifest.items)):
        assert ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < limit
    return users.tolist(), items.tolist()


def read_all(url: str) -> Any:
    graph = open_graph(url, load_manifest(url))
    arrays = (graph.user_indptr, graph.user_items, graph.item_indptr, graph.item_users)
    return [array.tolist() for array in arrays], [read(url, part) for part in SHARDS]


def _read_what(url: str, kind: str) -> Any:
    return read_all(url) if kind == "manifest" else read(url, kind)


class _Watch:
    """Notes each file that is opened outside a folder, and each connection and process."""

    def __init__(self, folder: Path) -> None:
        self._allowed = (str(folder), sys.prefix, sys.base_prefix, "/dev/null", "/proc/self")
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, words: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(words[0], str | bytes):
            path = os.path.realpath(os.fsdecode(words[0]))
            if not path.startswith(self._allowed) and "cnsdiff_dist" not in path:
                self.seen.append(path)
        elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
            self.seen.append(f"{event} {words[-1]}")


def _batch(dataset: str, kind: str, first: int, last: int) -> None:
    """Print a line before and after each case, so that the last line tells where a crash was."""
    folder = Path(tempfile.mkdtemp(dir=Path(dataset).parent)).resolve() / "hostile"
    shutil.copytree(dataset, folder)
    tree = json.loads((folder / "manifest.json").read_text())
    everything = kind == "manifest"
    clean = _read_what(dataset, kind)
    _limit_memory()
    watch = _Watch(folder)
    for case in range(first, last):
        if everything:
            (folder / "manifest.json").write_bytes(manifest_text(tree, case))
        else:
            _change_shard(folder, tree, kind, case)
        print(f"case {case}", flush=True)
        try:
            found = outcome(partial(_read_what, str(folder), kind))
            verdict = "refused" if found == REFUSED else "same" if found == clean else "changed"
        except BaseException as error:
            verdict = f"{type(error).__name__}: {error}"[:300]
        if watch.seen:
            verdict = f"opened {watch.seen}"
            watch.seen.clear()
        print(json.dumps([case, verdict]), flush=True)


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))


def _change_shard(folder: Path, tree: Any, part: str, case: int) -> None:
    changed, path = copy.deepcopy(tree), shard_of(tree, part)["path"]
    backup = folder / "clean"
    if not backup.exists():
        shutil.copy(folder / path, backup)
    content = mutated(backup.read_bytes(), case)
    reseal(changed, part, content, follow=case % 3 == 0)
    (folder / path).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(changed))


def _first(url: str, part: str) -> Any:
    """Read one step, or all of a part that is not streamed: either reads a whole row group."""
    return next(_train_rows(url, load_manifest(url), 1)) if part == "train" else read(url, part)


def _open_bomb(dataset: str, part: str) -> None:
    """Print by how many MiB the resident memory grew at most, and whether it was refused."""
    _limit_memory()
    before = peak_mib()
    found = outcome(partial(_first, dataset, part))
    print(json.dumps([peak_mib() - before, isinstance(found, str)]))


def peak_mib(reset: bool = False) -> int:
    """The largest resident memory of this process. getrusage would count its parent's as well."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


if __name__ == "__main__":
    url, what, *bounds = sys.argv[1:]
    if bounds:
        _batch(url, what, *map(int, bounds))
    else:
        _open_bomb(url, what)
