"""Users that share rows: rare ones in train, and those that come later."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import read_ids
from cnsdiff_dist.data.schema import SPLITS
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.inference.listed_users import listed_users
from tests.support.lists import read_lists
from tests.support.preparing import prepare, raw_pairs, skewed_log
from tests.support.ranks import run_ranks

N, BELOW = 4, 6
MINE = "newcomer"


def shared_id(user: object) -> Any:
    """The id of a user's shared row, as docs/data.md defines it, in the type of the ids."""
    return type(user)(-1 - int(hashlib.md5(str(user).encode()).hexdigest(), 16) // 16**24 % N)


@pytest.fixture(scope="module", params=["numbers", "text"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = skewed_log(users=400)
    if request.param == "text":
        named = pc.binary_join_element_wise("u", table["user"].cast(pa.string()), "")
        table = table.set_column(0, "user", named)
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("shift", ["random", "popularity"])
def test_rare_users_share_rows_and_nothing_else_changes(
    log: Path, tmp_path: Path, shift: str
) -> None:
    out, table = tmp_path / "out", pq.read_table(log)
    words = ["--log", log, "--shift", shift, "--hashed-users", N, "--hashed-below", BELOW]
    manifest = prepare(out, *words)
    pairs = list(zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True))
    users, counts = np.unique(table["user"].to_numpy(zero_copy_only=False), return_counts=True)
    rare = {user.item() if hasattr(user, "item") else user for user in users[counts < BELOW]}
    assert 20 < len(rare) < len(users) - 20
    own = {(user, item) for user, item in pairs if user not in rare}
    shared = {(shared_id(user), item) for user, item in pairs if user in rare}
    found = {split: raw_pairs(out, manifest, split) for split in SPLITS}
    assert sum(map(len, found.values())) == len(own) + len(shared)
    assert {pair for split in found.values() for pair in split} == own | shared
    assert shared <= set(found["train"])
    # The cuts leave 52 % of the rows of those who have rows of their own.
    assert len(own & set(found["train"])) / len(own) == pytest.approx(0.52, abs=0.03)
    assert manifest.hashed_users == N
    assert manifest.dropped["hashed"] == len(pairs) - len(own) - len(shared)
    ids = read_ids(str(out), manifest, "users")["id"].to_pylist()
    assert ids[-N:] == [type(ids[0])(-1 - h) for h in range(N)]
    assert len(set(ids)) == len(ids) == len(users) - len(rare) + N


def test_popularity_is_that_of_the_rows_that_can_be_cut(tmp_path: Path) -> None:
    """Half of the items are liked mostly by rare users, so they are rare among the other rows."""
    rng, pairs = np.random.default_rng(0), set()
    for user in range(200):
        pairs |= {
            (user, item) for item in np.r_[rng.permutation(50)[:10], 50 + rng.permutation(50)[:30]]
        }
    for user in range(200, 3000):
        pairs |= {(user, item) for item in rng.permutation(50)[:3]}
    users, items = map(list, zip(*pairs, strict=True))
    pq.write_table(pa.table({"user": users, "item": items}), tmp_path / "log.parquet")
    words = ["--shift", "popularity", "--hashed-users", 100, "--hashed-below", 10]
    manifest = prepare(tmp_path / "out", "--log", tmp_path / "log.parquet", *words)
    ood, iid = (
        np.mean([item < 50 for _, item in raw_pairs(tmp_path / "out", manifest, f"test_{split}")])
        for split in ("ood", "iid")
    )
    assert ood > 1.5 * iid


def test_without_the_option_the_digest_is_what_it_was(tmp_path: Path) -> None:
    pq.write_table(skewed_log(), tmp_path / "log.parquet")
    manifest = prepare(tmp_path / "out", "--log", tmp_path / "log.parquet", "--shift", "random")
    before = manifest.model_copy(update={"name": "", "digest": ""})
    content = before.model_dump_json(exclude={"hashed_users"})
    assert hashlib.sha256(content.encode()).hexdigest() == manifest.digest


def test_rows_of_rare_users_in_ready_splits_go(tmp_path: Path) -> None:
    logs = {
        "train": {"user": [1, 1, 2, 3], "item": [0, 1, 0, 0]},
        "test-ood": {"user": [1, 2], "item": [2, 2]},
    }
    logs["train"]["user"].append(4)
    logs["train"]["item"].append(2)
    words: list[object] = ["--valid-fraction", 0, "--valid-ood-fraction", 0, "--hashed-users", 1]
    for split, columns in logs.items():
        pq.write_table(pa.table(columns), tmp_path / split)
        words += [f"--{split}", tmp_path / split]
    manifest = prepare(tmp_path / "out", *words, "--hashed-below", 2)
    train = sorted(raw_pairs(tmp_path / "out", manifest, "train"))
    assert train == [(-1, 0), (-1, 2), (1, 0), (1, 1)]
    assert raw_pairs(tmp_path / "out", manifest, "test_ood") == [(1, 2)]
    assert manifest.dropped["hashed"] == 2  # user 3's item 0, which user 2 has too, and a test row


@pytest.mark.parametrize(
    ("user", "words", "said"),
    [
        ([-2, 1, 2], ["--hashed-users", 3], r"there is a user -2, and -1 \.\. -3 are the ids"),
        (["-1.4", "-4", "2"], ["--hashed-users", 3], "no user has as many train rows"),
        (
            [2, 4, 5, 1, 1],
            ["--hashed-users", 3],
            r"3 users .* fill only 1 of them; take 1, or raise",
        ),
        ([1, 2, 3], ["--hashed-users", 10**42], "there are only 3 users"),
        ([1, 2, 3], ["--hashed-users", 1], "no user has as many train rows"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, user: list[Any], words: list[object], said: str
) -> None:
    log = pa.table({"user": user, "item": np.arange(len(user))})
    pq.write_table(log, tmp_path / "log.parquet")
    words = [*words, "--hashed-below", 2, "--valid-fraction", 0]
    with pytest.raises(UserError, match=said):
        prepare(tmp_path / "out", "--train", tmp_path / "log.parquet", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["seven", "007", "1.5", "9" * 5000, "٣", str(2**63), "-0", "1\u20282"]
)
def test_what_is_no_user_id_is_refused(tmp_path: Path, name: str) -> None:
    pq.write_table(skewed_log(), tmp_path / "log.parquet")
    words = ["--log", tmp_path / "log.parquet", "--shift", "random", "--hashed-users", 1]
    manifest = prepare(tmp_path / "out", *words, "--hashed-below", 30)
    (tmp_path / "users.txt").write_text(f"\ufeff0\n{2**63 - 1}\r\n{name}\n")
    run: Any = SimpleNamespace(data_url=str(tmp_path / "out"), manifest=manifest)
    with pytest.raises(UserError, match=r"users\.txt line 3: .* is not a user of this dataset"):
        listed_users(run, str(tmp_path / "users.txt"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hashed")
    table = skewed_log(users=400)
    names = pc.binary_join_element_wise("u", table["user"].cast(pa.string()), "")
    pq.write_table(table.set_column(0, "user", names), folder / "log.parquet")
    words = ["--log", folder / "log.parquet", "--shift", "random", "--hashed-users", N]
    prepare(folder / "data", *words, "--hashed-below", BELOW)
    (folder / "config.yaml").write_text(
        f"data: {{url: {folder / 'data'}, streams: 2}}\nrun: {{dir: {folder / 'run'}}}\n"
        "model: {dim: 8, layers: 1}\n"
        "train: {batch: 256, epochs: 1, select_split: valid_ood}\n"
    )
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def listed(run: Path) -> list[str]:
    """A newcomer, two users with rows of their own, a rare one, and the shared rows."""
    table = pq.read_table(run.parent / "log.parquet")
    counts = pc.value_counts(table["user"]).to_pylist()
    rare = next(count["values"] for count in counts if count["counts"] < BELOW)
    known = [count["values"] for count in counts if count["counts"] >= BELOW]
    return [MINE, known[0], rare, *map(str, range(-N, 0)), known[1]]


def test_newcomers_get_the_list_of_the_row_they_share(
    run: Path, listed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = _recommend(run, listed, tmp_path / "r")
    assert "for 8 users (2 by shared rows)" in capsys.readouterr().out
    assert set(lists) == set(listed) and {len(found) for found in lists.values()} == {3}
    assert lists[MINE] == lists[shared_id(MINE)]
    assert lists[listed[2]] == lists[shared_id(listed[2])]
    # What others of the row have had is not kept from them: it may be what they would like.
    user, item = _vectors(run, tmp_path / "e")
    best = sorted(item, key=lambda name: -float(item[name] @ user[shared_id(MINE)]))[:3]
    assert [name for name, _ in lists[MINE]] == best
    assert main(["recommend", str(run), str(tmp_path / "all"), "--k", "3"]) == 0
    everybody = read_lists(tmp_path / "all")
    assert all(lists[user] == everybody[user] for user in listed if user in everybody)


@pytest.mark.distributed
def test_on_two_ranks_they_get_the_same(run: Path, listed: list[str], tmp_path: Path) -> None:
    one = _recommend(run, listed, tmp_path / "one")
    run_ranks(2, _recommend, run, listed, tmp_path / "two")
    two = read_lists(tmp_path / "two")
    assert {user: [item for item, _ in found] for user, found in one.items()} == {
        user: [item for item, _ in found] for user, found in two.items()
    }


def _vectors(run: Path, out: Path) -> list[dict[Any, Any]]:
    assert main(["export", str(run), str(out)]) == 0
    tables = [pq.read_table(out / side).to_pydict() for side in ("users", "items")]
    return [
        dict(zip(table["id"], map(np.asarray, table["embedding"]), strict=True)) for table in tables
    ]


def _recommend(run: Path, users: list[str], out: Path) -> dict[str, list[tuple[Any, float]]]:
    file = out.with_suffix(".txt")
    file.write_text("\n".join(users))
    assert main(["recommend", str(run), str(out), "--k", "3", "--users", str(file)]) == 0
    return read_lists(out)
