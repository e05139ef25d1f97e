"""How torch.distributed.checkpoint (DCP) writes and reads the files of one checkpoint.

The writer hashes each file as it writes it, and renames none, because object stores cannot. The
reader unpickles nothing but a tree of known metadata classes, and reads only files that the
checkpoint lists.
"""

import hashlib
import io
import math
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import EnumType
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageReaderTransforms
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from cnsdiff_dist import storage
from cnsdiff_dist.checkpoint.commit import METADATA
from cnsdiff_dist.checkpoint.state import local_tensors

Files = dict[str, dict[str, int | str]]
"""File name -> its ``bytes`` and ``sha256``."""

_DTYPES = {name for name, value in vars(torch).items() if type(value) is torch.dtype}
# Module -> the names that a .metadata may use. They are compared whole, because a dotted name
# such as "os.system" would reach what the module imports.
_KNOWN = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
}


class Writer(FsspecWriter):
    """Writes this rank's file into ``url``, and ``.metadata`` on the first rank.

    ``files`` lists what this rank has written.
    """

    def __init__(self, url: str) -> None:
        local = storage.is_local(url)
        # Without file descriptors, as in an object store, torch would sync every local disk.
        super().__init__(str(storage.local_path(url)) if local else url, sync_files=local)
        self.files: Files = {}
        self.fs: Any = _HashingFileSystem(self.files)
        self.fs.fs, _ = storage.filesystem(url)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {
            result.index: result.storage_data for written in results for result in written
        }
        metadata.storage_meta = self.storage_meta()
        with self.fs.create_stream(self.fs.concat_path(self.path, METADATA), "wb") as file:
            pickle.dump(metadata, file)


class _HashingFileSystem(FileSystem):
    def __init__(self, files: Files) -> None:
        super().__init__()
        self._files = files

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashed = _HashedFile(stream)
            yield hashed
        sha256 = hashed.digest.hexdigest()
        self._files[PurePosixPath(path).name] = {"bytes": hashed.bytes, "sha256": sha256}


class _HashedFile(io.RawIOBase):
    """A file that is written from its start to its end, without seeking."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._stream.write(data)
        self.digest.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def flush(self) -> None:
        self._stream.flush()


class Reader(FsspecReader):
    """Reads a checkpoint whose ``files`` are known, without running code that it may contain.

    ``.metadata`` is a pickle: it may use known classes only, and name only files in ``files``.
    torch loads the tensors with ``weights_only``.
    """

    def __init__(self, url: str, files: Files) -> None:
        super().__init__(str(storage.local_path(url)) if storage.is_local(url) else url)
        self.fs: Any
        self.fs.fs, _ = storage.filesystem(url)
        self._files = files
        self.transforms = _RefuseCompressed()
        # Read here because torch calls read_metadata, and would log its failure with a traceback.
        self._metadata = self._read_metadata()

    def read_metadata(self) -> Metadata:
        return self._metadata

    def _read_metadata(self) -> Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, METADATA), "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("its .metadata is of another kind: not a checkpoint of ours")
        for info in (metadata.storage_data or {}).values():
            if info.relative_path not in self._files:
                raise ValueError(f"its .metadata names a file {info.relative_path!r} not its own")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _SeekableView(io.RawIOBase):
    """Corrects torch's view of a part of a file, whose ``seek`` from the end is wrong."""

    def __init__(self, view: Any) -> None:
        self._view = view

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._view.len}[whence]
        self._view.seek(max(start + offset, 0))
        return self.tell()

    def tell(self) -> int:
        return int(self._view.tell())

    def readinto(self, buffer: Any) -> int:
        return int(self._view.readinto(buffer))


class _RefuseCompressed(_StorageReaderTransforms):
    """Refuses compressed archives: torch writes none, and a small one could fill the memory."""

    def transform_load_stream(
        self, read_item: ReadItem, transform_descriptors: Sequence[str], raw_stream: Any
    ) -> Any:
        if transform_descriptors:
            raise ValueError("it was written through a transform: not a checkpoint of ours")
        with zipfile.ZipFile(_SeekableView(raw_stream)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("a compressed archive: not a checkpoint of ours")
        raw_stream.seek(0)
        return raw_stream


class Planner(DefaultLoadPlanner):
    """Fills tensors and refuses entries of any other kind, which torch would unpickle."""

    def create_local_plan(self) -> LoadPlan:
        """Plan what this rank reads, as DCP's planner does.

        Raises:
            ValueError: the checkpoint lacks numbers of a wanted tensor, or has no tensor there.
        """
        plan = super().create_local_plan()
        found: Counter[str] = Counter()
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise _not_a_tensor(item)
            found[item.dest_index.fqn] += math.prod(item.lengths)
        for name, value in self.state_dict.items():
            wanted = sum(tensor.numel() for tensor in local_tensors(value))
            if found[name] != wanted:
                raise ValueError(f"{name}: {found[name]} of {wanted} numbers: not whole")
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise _not_a_tensor(read_item)


def _not_a_tensor(item: ReadItem) -> ValueError:
    return ValueError(f"{item.dest_index.fqn} is no tensor: not a checkpoint of ours")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # Python before 3.11.4 pickles an enum member as a getattr call
        if name not in _KNOWN.get(module, ()):
            raise ValueError(f"its .metadata names {module}.{name}: not a checkpoint of ours")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    if not isinstance(owner, EnumType):
        raise ValueError(f"its .metadata asks for {name} of no enum: not a checkpoint of ours")
    return owner[name]
