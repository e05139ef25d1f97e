"""Hostile raw logs: refused in one line or prepared."""

import bz2
import gzip
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnsdiff_dist.prepare import log_formats
from tests.support.hostile import cases, within
from tests.support.hostile_datasets import REFUSED, outcome
from tests.support.mutating import mutated, seeds
from tests.support.preparing import prepare


def _rows(seed: int, count: int = 60) -> list[tuple[int, int, int, int]]:
    draw = np.random.default_rng(seed)
    pairs = np.unique(draw.integers(0, 12, (count, 2)), axis=0)
    return [(int(u), int(i), int(draw.integers(1, 6)), 1_000 + n) for n, (u, i) in enumerate(pairs)]


def _log(kind: str, folder: Path) -> bytes:
    rows, head = _rows(1), ["user", "item", "rating", "timestamp"]
    if kind == "parquet":
        table = pa.table(dict(zip(head, map(list, zip(*rows, strict=True)), strict=True)))
        pq.write_table(table, folder / "clean.parquet")
        return (folder / "clean.parquet").read_bytes()
    if kind == "inter":
        head = ["user:token", "item:token", "rating:float", "timestamp:float"]
    lines = [line[:3] for line in rows] if kind == "triples" else [head, *rows]
    mark = {"csv": ",", "tsv": "\t", "inter": "\t", "triples": " "}[kind]
    return "\n".join(mark.join(map(str, line)) for line in lines).encode()


ODD = [
    b'"',
    b'""',
    b"\x00",
    b"\r",
    b"\n\n",
    b"\xff",
    b",",
    b"\t",
    b" ",
    b"9" * 400,
    b"-1",
    b"1e400",
]
ODD += [b"nan", b"'", b"\\", b";", b"\xef\xbb\xbf", b"x" * 5_000, "é\u2028".encode(), b"=1+1"]


def _prepared(out: Path, log: Path, *words: object) -> Any:
    shutil.rmtree(out, ignore_errors=True)
    found = outcome(lambda: prepare(out, "--log", log, "--shift", "random", *words))
    if found == REFUSED:
        assert not out.exists()
        return found
    counts = [split.rows for split in found.splits.values()]
    assert found.users > 0 and found.items > 0 and found.train.rows > 0 and min(counts) >= 0
    return found


@pytest.mark.parametrize("kind", ["csv", "tsv", "inter", "triples", "parquet"])
def test_raw_logs_are_refused_or_prepared(tmp_path: Path, kind: str) -> None:
    clean = _log(kind, tmp_path)
    suffix = "txt" if kind == "triples" else kind

    @cases(12)
    @given(seeds(), st.lists(st.tuples(st.integers(0, 2**32), st.sampled_from(ODD)), max_size=2))
    def run(seed: int, odd: list[tuple[int, bytes]]) -> None:
        content = clean if odd else mutated(clean, seed)
        for at, bit in odd:
            content = content[: at % len(clean)] + bit + content[at % len(clean) :]
        log = tmp_path / f"log.{suffix}"
        log.write_bytes(content)
        with within(120):
            _prepared(tmp_path / "out", log)

    run()


@pytest.mark.parametrize("name", ["log.csv.gz", "log.csv.zst", "log.csv.bz2", "log.csv.xz"])
def test_compressed_logs_are_refused_or_prepared(tmp_path: Path, name: str) -> None:
    kind = name.rpartition(".")[2]
    text = b"user,item,rating,timestamp\n" + b"\n".join(b"%d,%d,%d,%d" % row for row in _rows(1))
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda content: bytes(pa.Codec("zstd").compress(content, asbytes=True)),
    }
    clean = pack[kind](text)

    @cases(8)
    @given(seeds())
    def run(seed: int) -> None:
        (tmp_path / name).write_bytes(mutated(clean, seed))
        _prepared(tmp_path / "out", tmp_path / name)

    run()


def test_a_log_that_is_one_endless_line_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 MiB from 2 MB: a reader that looks for the line's end would take any amount.

    Arrow reads up to 32 blocks of 4 MiB ahead; how many depends on how busy the machine is.
    """
    seen: list[int] = []
    original = log_formats.storage.open_read

    def counted(url: str, compression: str | None = None) -> Any:
        file = original(url, compression)
        read = file.read

        def note(size: int = -1) -> bytes:
            data = read(size)
            seen.append(len(data))
            return data

        monkeypatch.setattr(file, "read", note, raising=False)
        return file

    monkeypatch.setattr(log_formats.storage, "open_read", counted)
    log = tmp_path / "log.csv.gz"
    with gzip.open(log, "wb", 1) as file:
        file.write(b"user,item\n1,2\n")
        for _ in range(512):
            file.write(b"1" * (1 << 20))
    assert _prepared(tmp_path / "out", log) == REFUSED
    assert sum(seen) < 256 << 20
