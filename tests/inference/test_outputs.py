"""`cnsdiff export` and `recommend`: what they write, and what they replace."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import join_world
from tests.support.ranks import files_under, run_ranks
from tests.support.trainers import trained_run


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(dataset, tmp_path_factory.mktemp("trained"))


def test_export_and_recommend_agree_on_raw_ids(trained: Path, dataset: str, tmp_path: Path) -> None:
    assert main(["export", str(trained), str(tmp_path / "e")]) == 0
    assert main(["recommend", str(trained), str(tmp_path / "r"), "--k", "7"]) == 0
    tables = {side: pq.read_table(tmp_path / "e" / side) for side in ("users", "items")}
    vectors = {
        side: dict(
            zip(table["id"].to_pylist(), np.stack(table["embedding"].to_pylist()), strict=True)
        )
        for side, table in tables.items()
    }
    manifest = load_manifest(dataset)
    assert len(vectors["users"]) == manifest.users and len(vectors["items"]) == manifest.items
    rows = pq.read_table(tmp_path / "r", columns=["user", "item", "score", "rank"]).to_pylist()
    assert len(rows) == manifest.users * 7
    known = _raw_train_pairs(dataset)
    items, matrix = list(vectors["items"]), np.stack(list(vectors["items"].values()))
    for start in range(0, len(rows), 7):
        mine = rows[start : start + 7]
        user = mine[0]["user"]
        score = matrix @ vectors["users"][user]
        score[[index for index, item in enumerate(items) if (user, item) in known]] = -np.inf
        assert [row["rank"] for row in mine] == list(range(1, 8))
        assert [row["score"] for row in mine] == pytest.approx(np.sort(score)[::-1][:7], rel=1e-4)
        assert all((user, row["item"]) not in known for row in mine)


def _raw_train_pairs(dataset: str) -> set[tuple[Any, Any]]:
    ids = {
        side: pq.read_table(f"{dataset}/ids/{side}")["id"].to_pylist()
        for side in ("users", "items")
    }
    table = pq.read_table(f"{dataset}/train")
    return {
        (ids["users"][u], ids["items"][i])
        for u, i in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True)
    }


def test_recommend_for_listed_users_only(trained: Path, dataset: str, tmp_path: Path) -> None:
    raw = pq.read_table(f"{dataset}/ids/users")["id"].to_pylist()
    (tmp_path / "users.txt").write_text(f"{raw[3]}\n{raw[0]}\n\n")
    words = ["recommend", str(trained), str(tmp_path / "r"), "--users", str(tmp_path / "users.txt")]
    assert main(words) == 0
    assert set(pq.read_table(tmp_path / "r")["user"].to_pylist()) == {raw[0], raw[3]}


def test_a_second_output_replaces_the_first(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/part-00007.parquet").write_bytes(b"of an older, larger world")
    (tmp_path / "r/_SUCCESS").write_bytes(b'{"step": 3}')
    assert main(["recommend", str(trained), str(tmp_path / "r")]) == 0
    assert files_under(tmp_path / "r") == ["_SUCCESS", "part-00000.parquet"]


def test_an_output_never_deletes_what_is_not_its_own(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "train").mkdir(parents=True)
    (target / "train/part-00000.parquet").write_bytes(b"someone's")
    for command in ("export", "recommend"):
        assert main([command, str(trained), str(target)]) == 2
    assert files_under(target) == ["train/part-00000.parquet"]


def _export(run: str, out: str) -> int:
    join_world(60)
    return main(["export", run, f"{out}/e"]) + main(["recommend", run, f"{out}/r", "--k", "3"])


@pytest.mark.distributed
def test_two_ranks_export_and_recommend_like_one(trained: Path, tmp_path: Path) -> None:
    assert _export(str(trained), str(tmp_path / "one")) == 0
    assert run_ranks(2, _export, str(trained), str(tmp_path / "two")) == [0, 0]
    for side in ("users", "items"):
        one, two = (pq.read_table(tmp_path / n / "e" / side).to_pydict() for n in ("one", "two"))
        assert one["id"] == two["id"]
        assert np.allclose(one["embedding"], two["embedding"], atol=1e-6)
    one, two = (pq.read_table(tmp_path / n / "r").to_pydict() for n in ("one", "two"))
    assert one["user"] == two["user"] and one["item"] == two["item"]
