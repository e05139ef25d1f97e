"""Logs that the tests of this folder prepare."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.preparing import skewed_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.parquet"
    pq.write_table(skewed_log(), path)
    return path
