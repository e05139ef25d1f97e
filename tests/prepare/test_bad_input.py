"""Bad input is refused in one line with file, place and remedy, and leaves nothing behind."""

import gzip
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from cnsdiff_dist.errors import UserError
from tests.support.preparing import prepare, write_parquet

HEADER = "user,item,rating,timestamp\n"
RANDOM = ["--shift", "random"]


@pytest.fixture
def dead_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An endpoint where nobody listens, and no client of fsspec that outlives the test."""
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "joe")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def refused(tmp_path: Path, *words: object) -> str:
    """Run `cnsdiff prepare`, which refuses and writes nothing; the line that it says."""
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2,3,4\n\n1,3,good,5\n", "log.csv: line 4: column rating: 'good' is not a finite"),
        ("1,2,3,4\n1,3,-1,5\n", "log.csv: line 3: column rating: '-1' is not a rating of 0 or"),
        ("1,2,nan,4\n", "log.csv: line 2: column rating: 'nan' is not a finite number"),
        ("1,2,-inf,4\n", "log.csv: line 2: column rating: '-inf' is not a finite number"),
        ("1,2,,4\n", "log.csv: line 2: column rating: '' is not a finite number"),
        ("1,2,3,inf\n", "log.csv: line 2: column timestamp: 'inf' is not a finite number"),
        ("1,2,3,monday\n", "log.csv: line 2: column timestamp: 'monday' is not a finite number"),
        ("1,2,3,1e30\n", "log.csv: line 2: column timestamp: '1e30' is not a finite number"),
        ('1,2,3,4\n 1 ," ",3,4\n', "log.csv: line 3: column item: empty id; fill or drop"),
        (",2,3,4\n", "log.csv: line 2: column user: empty id; fill or drop the row"),
        ("1,2,3,4\n1,2,3\n", "log.csv: line 3: 3 columns, where 4 are expected; repair the line"),
        (
            "1,2,3,4\n1,3,3,4\n 1,2,5,6\n",
            "log.csv: line 4: user 1, item 2 again, after log.csv: line 2; --duplicates drop",
        ),
        ("", "log.csv: no rows; give a file with interactions"),
        ("1,2,3,4\n1,\udcff,3,4\n", "log.csv: line 3: not UTF-8 text"),
    ],
)
def test_bad_values(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes((HEADER + text).encode(errors="surrogateescape"))
    assert expected in refused(tmp_path, "--log", path, *RANDOM)


def test_a_bad_value_far_into_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = [f"{n},{n},5,{n}\n" for n in range(600_000)]
    rows[500_000] = "500000,500000,x,1\n"
    path.write_text(HEADER + "".join(rows))
    assert "log.csv: line 500002: column rating: 'x'" in refused(tmp_path, "--log", path, *RANDOM)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no user column; its columns are: who, item; pass --user-column and --item-column"),
        (["--user-column", "x"], "no column 'x' (--user-column); its columns are: who, item"),
        (["--columns", "a,b"], "no user column; its columns are: a, b; name them in --columns"),
        (["--user-column", "who", "--min-rating", 3], "no rating column, which --min-rating needs"),
    ],
)
def test_wrong_columns(words: list[object], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("who,item\n1,2\n")
    assert f"log.csv: {expected}" in refused(tmp_path, "--log", path, *RANDOM, *words)


def test_temporal_needs_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item\n1,2\n")
    for source, remedy in (
        ("--log", "or choose --shift popularity"),
        ("--train", "or choose --shift popularity or --valid-ood-fraction 0"),
    ):
        message = refused(tmp_path, source, path, "--shift", "temporal")
        assert "log.csv: no timestamp column, which --shift temporal needs" in message
        assert message.endswith(remedy)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    missing = refused(tmp_path, "--log", tmp_path / "none.csv", *RANDOM)
    assert missing == "none.csv: cannot read: no such file or directory; check the path"
    (tmp_path / "empty.csv").write_text(" \n")
    assert "empty.csv: empty file" in refused(tmp_path, "--log", tmp_path / "empty.csv", *RANDOM)
    nothing = refused(tmp_path, "--log", tmp_path / "*.parquet", *RANDOM)
    assert nothing == "*.parquet: no file matches; check the pattern and quote it"
    assert "is a directory; name a file" in refused(tmp_path, "--log", tmp_path, *RANDOM)


def test_damaged_files(tmp_path: Path) -> None:
    rows = list(range(50_000))
    good = tmp_path / "good.parquet"
    pq.write_table(pa.table({"user": rows, "item": rows}), good, write_page_checksum=True)
    data = good.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped.parquet").write_bytes(data[:9000] + b"\xff" * 100 + data[9100:])
    packed = gzip.compress(b"user,item\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in rows))
    (tmp_path / "cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "text.parquet").write_text("user,item\n1,2\n")
    for name in ("cut.parquet", "flipped.parquet", "cut.csv.gz", "text.parquet"):
        message = refused(tmp_path, "--log", tmp_path / name, *RANDOM)
        assert message.startswith(f"{name}: ")
        assert "damaged" in message


def test_parquet_types(tmp_path: Path) -> None:
    for columns, expected in (
        ({"user": [1.5], "item": [1]}, "column user holds double, but a user column"),
        ({"user": [1, None], "item": [1, 2]}, "log.parquet: row 2: column user: empty id"),
        ({"user": [1], "item": [1], "rating": [True]}, "column rating holds bool"),
        ({"user": [1], "item": [1], "rating": ["x"]}, "row 1: column rating: 'x' is not a finite"),
        ({"user": [1], "item": [1], "rating": [float("nan")]}, "row 1: column rating: 'nan'"),
    ):
        path = write_parquet(tmp_path / "log.parquet", **columns)
        assert expected in refused(tmp_path, "--log", path, *RANDOM)


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,rating\n1,2,3\n")
    message = refused(tmp_path, "--log", path, *RANDOM, "--min-rating", 4)
    assert message == "log.csv: no train row is left; lower --min-rating"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://joe:hunter2@127.0.0.1:9/log.csv?sig=hunter2", "http://127.0.0.1:9/log.csv: "),
        ("s3://joe:hunter2@bucket/log.csv", "s3://bucket/log.csv: "),
        ("s3://bucket/log.csv", "s3://bucket/log.csv: cannot read: the host does not answer"),
        ("nowhere://bucket/log.csv", "unknown protocol 'nowhere'; use a path, s3://"),
    ],
)
@pytest.mark.usefixtures("dead_s3")
def test_unreadable_urls_fail_fast_and_keep_secrets(url: str, shown: str, tmp_path: Path) -> None:
    start = time.monotonic()
    message = refused(tmp_path, "--log", url, *RANDOM)
    assert time.monotonic() - start < 200  # far less than a training waits
    assert shown in message
    assert "hunter2" not in message


@pytest.mark.usefixtures("dead_s3")
def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    log = write_parquet(tmp_path / "log.parquet", user=[1, 2], item=[1, 2])
    with pytest.raises(UserError, match="a file is in the way"):
        prepare(log, "--log", log, *RANDOM)
    with pytest.raises(UserError, match=r"s3://bucket/out.*the host does not answer"):
        prepare("s3://bucket/out", "--log", log, *RANDOM)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give one of --log, --train"),
        (["--log", "a", "--synthetic"], "give one of --log, --train"),
        (["--log", "a"], "--log needs --shift"),
        (["--log", "a", "--shift", "exposure"], "--shift exposure needs --uniform"),
        (["--log", "a", "--uniform", "b", "--shift", "random"], "drop --shift"),
        (["--train", "a", "--uniform", "b"], "--uniform goes with --log"),
        (["--test-ood", "a"], "--test-ood goes with --train"),
        (["--synthetic", "--memory-limit", "lots"], "--memory-limit lots: not a size"),
    ],
)
def test_options_that_do_not_fit(words: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in refused(tmp_path, *words)
