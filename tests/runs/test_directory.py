"""Which configs a run directory is read and continued with."""

from pathlib import Path

import pytest
import yaml

from cnsdiff_dist.config import KINDS, dump_config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.runs.directory import check_run, read_config, write_identity
from tests.support.small import small_config


@pytest.mark.parametrize("kind", KINDS["negatives"])
def test_a_run_of_an_earlier_build_is_read_and_continued(
    dataset: str, tmp_path: Path, world: World, kind: str
) -> None:
    """Those builds wrote the keys of every kind, whatever the kind."""
    run, manifest = tmp_path / "run", load_manifest(dataset)
    config = small_config(dataset, run, negatives={"kind": kind})
    write_identity(config, manifest, world)
    tree = yaml.safe_load(dump_config(config))
    every = {key: 3 for keys in KINDS["negatives"].values() for key in keys.model_fields}
    tree["negatives"] = every | tree["negatives"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert read_config(str(run)) == config
    check_run(config, manifest)
    tree["negatives"]["of_no_kind"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"unknown key negatives\.of_no_kind"):
        read_config(str(run))


def test_another_kind_is_another_run(dataset: str, tmp_path: Path, world: World) -> None:
    run, manifest = tmp_path / "run", load_manifest(dataset)
    write_identity(small_config(dataset, run, negatives={"kind": "dns"}), manifest, world)
    for other in ({"kind": "ahns"}, {"kind": "dns", "candidates": 9}):
        with pytest.raises(UserError, match=r"this run has negatives\.\w+=.*, not "):
            check_run(small_config(dataset, run, negatives=other), manifest)
