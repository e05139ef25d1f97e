"""Pickles and archives in a checkpoint that would run code or fill the memory."""

import io
import logging
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hostile import Victim
from tests.support.hostile_datasets import REFUSED, peak_mib
from tests.support.sealing import seal

_MODULE = b"ctorch.distributed.checkpoint.metadata\n"
_KNOWN = _MODULE + b"Metadata\n"


def _call(module: str, name: str, *words: str) -> list[bytes]:
    """Pickles that call a function when they are unpickled, by each way that the format has."""
    line = f"{module}\n{name}\n".encode()

    def text(word: str) -> bytes:
        return b"X" + len(word.encode()).to_bytes(4, "little") + word.encode()

    arguments = b"(" + b"".join(map(text, words)) + b"t"
    short = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)]
    stack_global = b"".join(short) + b"\x93"
    return [
        b"\x80\x02c" + line + arguments + b"R.",  # GLOBAL, REDUCE
        b"\x80\x04" + stack_global + arguments + b"R.",  # STACK_GLOBAL, REDUCE
        b"(" + b"".join(map(text, words)) + b"i" + line + b".",  # INST
        b"(c" + line + b"".join(map(text, words)) + b"o.",  # OBJ
        b"\x80\x02c" + line + arguments + b"\x81.",  # NEWOBJ
        b"\x80\x04" + stack_global + arguments + b"}\x92.",  # NEWOBJ_EX
        # An instance of a known class whose state is the result.
        b"\x80\x02" + _KNOWN + b")\x81c" + line + arguments + b"Rb.",
    ]


def _chained(marker: Path) -> list[bytes]:
    """Pickles that go from a known name to another by builtins.getattr or by dots."""

    def text(word: str) -> bytes:
        return b"X" + len(word).to_bytes(4, "little") + word.encode()

    chains = []
    for name in ("__init__", "__subclasses__", "__globals__", "__class__", "mro", "__reduce__"):
        for known in (_KNOWN, _MODULE + b"_MEM_FORMAT_ENCODING\n"):
            get = b"cbuiltins\ngetattr\n(" + known
            chains.append(b"\x80\x02" + get + text(name) + b"tR)R.")
    for module, name in (
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("torch", "os.system"),
        ("torch.serialization", "os.system"),
        ("torch", "load"),
        ("torch", "Size.__class__.__base__.__subclasses__"),
        ("torch.serialization", "load"),
        ("torch.serialization", "_get_layout.__globals__"),
    ):
        for pickled in _call(module, name, f"touch {marker}"):
            chains.append(pickled)
    return chains


def _attacks(marker: Path) -> list[bytes]:
    code = f"open({str(marker)!r}, 'w')"
    found = _chained(marker)
    for module, name, *words in (
        ("os", "system", f"touch {marker}"),
        ("posix", "system", f"touch {marker}"),
        ("subprocess", "getoutput", f"touch {marker}"),
        ("builtins", "eval", code),
        ("builtins", "exec", code),
        ("__builtin__", "eval", code),
        ("builtins", "open", str(marker), "w"),
        ("builtins", "__import__", "os"),
        ("functools", "partial", "os"),
        ("runpy", "run_path", str(marker)),
        ("operator", "methodcaller", "x"),
        ("importlib", "import_module", "antigravity"),
        ("torch._utils", "_rebuild_tensor_v2", "x"),
        ("torch.hub", "load", "x"),
        ("torch.jit", "load", "x"),
        ("torch.storage", "_load_from_bytes", "x"),
        ("numpy", "load", "x"),
        ("code", "interact", "x"),
        ("pickle", "loads", "x"),
        ("timeit", "timeit", code),
        ("pdb", "run", code),
        ("copyreg", "_reconstructor", "x"),
    ):
        found += _call(module, name, *words)
    for protocol in range(6):
        found.append(pickle.dumps(_Touch(marker), protocol))
    return found


class _Touch:
    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> Any:
        return open, (self._path, "w")


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Unpickled by Python itself, most of them run what they say."""
    done = 0
    for pickled in _call("os", "system", f"touch {tmp_path / 'owned'}")[:6]:
        try:
            pickle.loads(pickled)
        except (TypeError, pickle.UnpicklingError):
            continue
        finally:
            done += (tmp_path / "owned").exists()
            (tmp_path / "owned").unlink(missing_ok=True)
    assert done >= 4


def test_nothing_in_metadata_is_run(attacked: Victim, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    imported = set(sys.modules)
    for number, pickled in enumerate(_attacks(marker)):
        checkpoint = attacked.restore()
        (checkpoint / ".metadata").write_bytes(pickled)
        seal(checkpoint)
        assert attacked.refuses(), number
        assert (checkpoint / "commit.json").exists()  # it was read, not taken for damage
        if number % 8 == 0:  # slower, and the same code
            assert attacked.open() == REFUSED, number
        assert not marker.exists(), pickled
    assert not {"antigravity", "pdb", "timeit"} & (set(sys.modules) - imported)


def _zip(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def _place_archive(checkpoint: Path, archive: bytes) -> None:
    """Append the archive to a data file and make the metadata load the user table from it."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == "tables.weights.user":
            data = checkpoint / info.relative_path
            info.offset, info.length = data.stat().st_size, len(archive)
            with data.open("ab") as file:
                file.write(archive)
    path.write_bytes(pickle.dumps(metadata))
    seal(checkpoint)


def test_nothing_in_an_archive_is_run(attacked: Victim, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    rest = {"archive/version": b"3\n", "archive/byteorder": b"little"}
    for pickled in _attacks(marker):
        # torch falls back on a pickle that is in no archive.
        for archive in (_zip({"archive/data.pkl": pickled, **rest}), pickled):
            _place_archive(attacked.restore(), archive)
            assert attacked.refuses()
            assert not marker.exists(), pickled


def test_a_compressed_archive_does_not_fill_the_memory(attacked: Victim) -> None:
    """data.pkl inflates from 256 KiB to 256 MiB."""
    file = io.BytesIO()
    torch.save(torch.zeros(4), file)
    with zipfile.ZipFile(file) as archive:
        clean = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in clean if name.endswith("data.pkl"))
    # The unpickler would skip these bytes; it is the reader of the archive that inflates them.
    bomb = {**clean, name: clean[name] + bytes(1 << 28)}
    _place_archive(attacked.restore(), _zip(bomb, zipfile.ZIP_DEFLATED))
    before = peak_mib(reset=True)
    assert attacked.open() == REFUSED
    assert peak_mib() - before < 128


def test_a_refused_checkpoint_logs_no_traceback(
    attacked: Victim, caplog: pytest.LogCaptureFixture
) -> None:
    """torch logs what read_metadata raises, with its traceback, before it raises it."""
    (attacked.restore() / ".metadata").write_bytes(b"not a pickle")
    seal(attacked.checkpoint)
    with caplog.at_level(logging.WARNING):
        assert attacked.open() == REFUSED
    assert not [record for record in caplog.records if record.exc_info]
