"""Hostile manifests: refused or right, and nothing outside the dataset is opened."""

import json
from pathlib import Path

import pytest

from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.errors import UserError
from tests.support.hostile import replaced_content, verdicts_of
from tests.support.hostile_datasets import read, shard_of
from tests.support.mutating import mutated, odd_text, sweep


def test_manifests_are_refused_or_right_and_nothing_else_is_opened(dataset: str) -> None:
    tree = json.loads(Path(dataset, "manifest.json").read_text())
    count = len(sweep(tree)) + 255
    verdicts = verdicts_of(dataset, "manifest", count)
    bad = {n: v for n, v in verdicts.items() if v not in ("refused", "same")}
    shown = [(sweep(tree)[n][0] if n < len(sweep(tree)) else n, v) for n, v in bad.items()]
    assert not bad, f"{len(bad)} of {count}: {shown[:40]}"


PATHS = [
    "../secret",
    "/{outside}/secret",
    "file://{outside}/secret",
    "train/../../secret",
    "memory://secret",
    "s3://bucket/secret",
    "~/secret",
    "./../secret",
    "local:/x",
    "train/part-00000.parquet::zip://x",
    "\x00",
    "",
]


@pytest.mark.parametrize("where", ["train", "valid_ood", "users", "graph"])
def test_a_manifest_cannot_name_files_outside_its_directory(victim: Path, where: str) -> None:
    (victim.parent / "secret").write_bytes(b"hunter2" * 100)

    def act() -> object:
        if where == "graph":
            return open_graph(str(victim), load_manifest(str(victim)))
        return read(str(victim), where)

    for path in PATHS:
        tree = json.loads((victim / "manifest.json").read_text())
        entry = tree["graph"]["user_items"][0] if where == "graph" else shard_of(tree, where)
        entry["path"] = path.format(outside=victim.parent)
        manifest = json.dumps(tree).encode()
        with (
            replaced_content(victim / "manifest.json", manifest),
            pytest.raises(UserError) as caught,
        ):
            act()
        assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


def test_odd_text_is_what_it_says() -> None:
    """The generators of hostile texts still make many different ones."""
    tree = {"users": 1, "list": [1, 2]}
    texts = {odd_text(tree, seed) for seed in range(100)}
    assert len(texts) > 10 and b"" in texts
    assert len({mutated(b"PAR1" * 50, seed) for seed in range(100)}) > 90
