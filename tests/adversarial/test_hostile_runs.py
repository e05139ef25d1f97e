"""Hostile run directories: damaged files, JSON of any kind, odd names and links."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given

from cnsdiff_dist.checkpoint.commit import digest_of
from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.evaluation.adjustment import Calibration, read_calibration
from cnsdiff_dist.runs.reporter import Reporter
from tests.support.hostile import Victim, cases
from tests.support.hostile_datasets import REFUSED, outcome
from tests.support.mutating import json_texts, mutated, seeds
from tests.support.sealing import seal


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damage_of_a_checkpoint_is_seen(attacked: Victim, name: str) -> None:
    @cases(50)
    @given(seeds())
    def run(seed: int) -> None:
        path = attacked.restore() / name
        clean = path.read_bytes()
        path.write_bytes(mutated(clean, seed))
        whole = path.read_bytes() == clean
        assert attacked.open() == (attacked.best if whole else REFUSED)
        assert attacked.resume() == (attacked.resumed if whole else REFUSED)

    run()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_sealed_damage_of_a_checkpoint_raises_nothing_else(attacked: Victim, name: str) -> None:
    @cases(60)
    @given(seeds())
    def run(seed: int) -> None:
        path = attacked.restore() / name
        path.write_bytes(mutated(path.read_bytes(), seed))
        seal(path.parent)
        attacked.open()
        attacked.resume()

    run()


@pytest.mark.parametrize("sealed", [False, True])
def test_commit_json_is_refused_or_right(attacked: Victim, sealed: bool) -> None:
    record = json.loads((attacked.restore() / "commit.json").read_text())

    @cases(60)
    @given(json_texts(record))
    @example(b"[" * 100_000)
    @example(b"{}")
    def run(text: bytes) -> None:
        path = attacked.restore() / "commit.json"
        path.write_bytes(text)
        if sealed:
            try:
                tree = json.loads(text)
                seal(path.parent, tree)
            except (ValueError, AttributeError, TypeError, RecursionError):
                return  # nothing to seal
        opened, resumed = attacked.open(), attacked.resume()
        if not sealed:
            assert opened in (REFUSED, attacked.best) and resumed in (REFUSED, attacked.resumed)

    run()


def test_sealed_progress_of_any_type(attacked: Victim) -> None:
    record = json.loads((attacked.restore() / "commit.json").read_text())
    failed = []
    values: list[Any] = [None, [], {}, "x", "a\nb", -1, 10**400, float("nan"), 1.5, True]
    for key in [*record["progress"], "more", None]:
        for value in values:
            changed = copy.deepcopy(record)
            if key is None:
                changed["progress"] = value
            else:
                changed["progress"][key] = value
            seal(attacked.restore(), changed)
            for act in (attacked.open, attacked.resume):
                try:
                    act()
                except Exception as error:
                    what = f"{type(error).__name__}: {str(error)[:60]}"
                    failed.append(f"{act.__name__} {key}={str(value)[:8]}: {what}")
    assert not failed, "\n".join(failed[:30])


@pytest.mark.parametrize("name", ["dataset.json", "calibration.json", "metrics.jsonl"])
def test_json_of_a_run_is_refused_or_right(attacked: Victim, name: str) -> None:
    attacked.restore()
    path = attacked.folder / name
    step = int(attacked.checkpoint.name[-8:])
    tree: Any = {
        "alpha": 0.5,
        "split": "valid_iid",
        "metric": "recall@20",
        "step": step,
        "exposure": None,
        "curve": [{"alpha": 0.5, "metrics": {}}],
    }
    if name == "dataset.json":
        tree = json.loads(path.read_text())
    if name == "metrics.jsonl":
        tree = json.loads(path.read_text().splitlines()[0])

    @cases(60)
    @given(json_texts(tree))
    @example(b"[" * 100_000)
    @example(b'{"step": ' + b"9" * 400 + b"}")
    @example(b'{"step": "a\\nb"}')
    @example(json.dumps({**tree, "step": "a\nb"}).encode())
    @example(json.dumps({**tree, "name": "a\nb", "digest": "x"}).encode())
    @example(json.dumps({**tree, "digest": 1}).encode())
    @example(json.dumps({**tree, "alpha": 10**400}).encode())
    def run(text: bytes) -> None:
        path.write_bytes(text)
        if name == "dataset.json":
            found = attacked.check_dataset()
        elif name == "calibration.json":
            found = outcome(lambda: read_calibration(str(attacked.folder), step))
            assert found == REFUSED or isinstance(found, Calibration)
        else:
            found = outcome(lambda: _reported(attacked.folder))

    run()


def _reported(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Reporter(str(folder), 5, 10):
            pass


def test_a_torn_last_line_of_the_metrics_goes_and_the_others_stay(attacked: Victim) -> None:
    attacked.restore()
    path = attacked.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for cut in range(1, len(lines[1]) - 2, 7):
        path.write_text(lines[0] + lines[1][:cut])
        _reported(attacked.folder)
        assert path.read_text() == lines[0]


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "x/../../outside",
        "file:///etc/passwd",
        "memory://x",
        "~",
        "a\nb",
        "\u2028",
        "\x00",
        "",
        ".",
        "x" * 5_000,
    ],
)
def test_a_commit_cannot_list_files_outside(attacked: Victim, name: str) -> None:
    outside = attacked.folder.parent / "outside"
    outside.write_bytes(b"hunter2")
    path = attacked.restore() / "commit.json"
    record = json.loads(path.read_text())
    record.pop("digest")
    record["files"][name] = {"bytes": 7, "sha256": "0" * 64}
    path.write_text(json.dumps({**record, "digest": digest_of(record)}))
    assert attacked.open() == REFUSED
    assert attacked.resume() == REFUSED
    assert outside.read_bytes() == b"hunter2"


@pytest.mark.parametrize(
    "kind", ["file", "link to a folder", "dangling link", "link to itself", "odd"]
)
def test_what_lies_beside_checkpoints_is_left_alone(
    attacked: Victim, tmp_path: Path, kind: str, world: World
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("a user's file")
    folder = attacked.restore().parent
    early = folder / "step-00000001"
    if kind == "file":
        early.write_text("x")
    elif kind == "link to a folder":
        early.symlink_to(outside)
    elif kind == "dangling link":
        early.symlink_to(tmp_path / "nowhere")
    elif kind == "link to itself":
        early.symlink_to(early)
    else:
        arabic = "".join(chr(0x660 + int(digit)) for digit in "00000001")
        odds = ("step-00000001x", "step-1", f"step-{arabic}", "step-00000001\n", "x step-00000001")
        for odd in odds:
            (folder / odd).mkdir()
            (folder / odd / "commit.json").write_text("{}")
    assert attacked.open() in (REFUSED, attacked.best)
    assert attacked.resume() in (REFUSED, attacked.resumed)
    outcome(lambda: Checkpoints(str(attacked.folder), world).prune(1, None))
    assert (outside / "mine").read_text() == "a user's file"


def test_a_linked_checkpoint_is_not_deleted_through(
    attacked: Victim, tmp_path: Path, world: World
) -> None:
    """Pruning removes the link, never what it leads to."""
    newest = attacked.restore()
    outside = tmp_path / "step-00000001"
    shutil.copytree(newest, outside)
    (newest.parent / "step-00000001").symlink_to(outside)
    outcome(lambda: Checkpoints(str(attacked.folder), world).prune(1, None))
    assert (outside / ".metadata").exists() and (outside / "commit.json").exists()


def test_a_step_of_any_length(attacked: Victim) -> None:
    folder = attacked.restore().parent
    failed = []
    for digits in ("9" * 19, "9" * 200):
        shutil.copytree(attacked.restore(), folder / f"step-{digits}")
        for act in (attacked.open, attacked.resume):
            try:
                act()
            except Exception as error:
                failed.append(f"{len(digits)} {act.__name__}: {type(error).__name__} {error}"[:200])
    assert not failed
