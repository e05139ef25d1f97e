from pathlib import Path

import pytest
import yaml

from cnsdiff_dist.config import (
    KINDS,
    Config,
    describe_config,
    dump_config,
    load_config,
    parse_config,
)
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.runs.records import read_settings

PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def _load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(str(path), list(overrides))


def test_overrides_beat_the_file_which_beats_defaults(tmp_path: Path) -> None:
    text = "train: {epochs: 7, batch: 1024}\n"
    config = _load(tmp_path, text, "train.epochs=3", "loss.l2=1e-4", "generator.levels=[2,9]")
    assert (config.train.epochs, config.train.batch, config.train.patience) == (3, 1024, 4)
    assert config.loss.l2 == 1e-4 and config.generator.levels == (2, 9)


def test_a_dumped_config_reads_back_the_same(tmp_path: Path) -> None:
    config = _load(tmp_path, "", "train.epochs=3")
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epoch=3"], r"unknown key train\.epoch; did you mean train\.epochs\?"),
        (["trian.epochs=3"], "unknown key trian; did you mean train"),
        (["train.epochs=three"], r"train\.epochs: .*integer.*'three'"),
        (["train.epochs=0"], r"train\.epochs: .*greater than or equal to 1"),
        (["train.epochs=1.5"], r"train\.epochs"),
        (["train.epochs"], "written section.key=value"),
        (["train=3"], r"train is a section; write train\.KEY=VALUE"),
        (["evaluation.k=[0,20]"], r"evaluation\.k\.0"),
        (["evaluation.k=[]"], r"evaluation\.k"),
        (["generator.condition=[user,user]"], "at most once"),
        (["tables.lr=.inf"], r"tables\.lr"),
        (["tables.sharding=column_wise"], "needs optimizer adagrad or sgd"),
        (["run.seed=20260101000000"], r"run\.seed"),
        (["train.batch=[1"], "not YAML"),
        (["train.batch=100"], r"multiple of data\.streams"),
        (["train.select_metric=recall@30"], r"K=30 in evaluation\.k"),
        (["generator.levels=[30]"], r"levels must lie in 1\.\.steps"),
        (["generator.precision=fp16"], "precision"),
        (["generator.precision=bf16", "generator.zero_stage=0"], "bf16 needs zero_stage"),
        (["negatives.mix_start=[0,1]"], "both above 0"),
        (["negatives=3"], r"negatives is a section; write negatives\.KEY=VALUE"),
        (["negatives.kind=nothing"], r"negatives\.kind: one of uniform, .*, not 'nothing'"),
        (["negatives.kind=[1]"], r"negatives\.kind: one of uniform, .*, not \(1,\)"),
        (["negatives.kind=dns", "negatives.candidats=3"], r"did you mean negatives\.candidates"),
        (["objective.kind=hinge"], r"objective\.kind: one of bpr, softmax, not 'hinge'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _load(tmp_path, "", *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "train: {", "3"])
def test_what_is_not_a_config_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"config\.yaml"):
        _load(tmp_path, text)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_presets_are_valid(path: Path) -> None:
    assert load_config(str(path), []).data.url


def test_every_key_is_listed() -> None:
    listed = {key.name for key in describe_config()}
    tree = Config().model_dump()
    for section, kinds in KINDS.items():
        tree[section] = {key: None for keys in kinds.values() for key in keys.model_fields}
    assert listed == {f"{section}.{key}" for section in tree for key in tree[section]}


@pytest.mark.parametrize("section", KINDS)
def test_a_kind_has_its_own_keys_alone(tmp_path: Path, section: str) -> None:
    every = {key for keys in KINDS[section].values() for key in keys.model_fields}
    for kind, keys in KINDS[section].items():
        settings = getattr(_load(tmp_path, "", f"{section}.kind={kind}"), section)
        assert settings == keys() and settings.kind == kind
        for key in every - set(keys.model_fields):
            with pytest.raises(
                UserError, match=rf"{section}\.kind={kind} has only .*{section}\.kind"
            ):
                _load(tmp_path, "", f"{section}.kind={kind}", f"{section}.{key}=1")
            with pytest.raises(UserError, match=f"unknown key {section}.{key}"):
                _load(tmp_path, f"{section}: {{kind: {kind}, {key}: 1}}")


def test_another_kind_leaves_the_files_keys_of_its_own_kind_behind(tmp_path: Path) -> None:
    text = "negatives: {kind: srns, candidates: 5, hardness: 3.0}"
    assert _load(tmp_path, text, "negatives.kind=dns").negatives.model_dump() == {
        "kind": "dns",
        "candidates": 5,
    }
    words = ["negatives.top=2", "negatives.kind=dns_mn"]
    for order in (words, words[::-1]):
        settings = _load(tmp_path, text, *order).negatives
        assert settings.model_dump() == {"kind": "dns_mn", "candidates": 5, "top": 2}


def test_the_plain_loader_of_a_runs_config_agrees_with_the_config(tmp_path: Path) -> None:
    """`cnsdiff status` reads a run's config without torch, hence without its kinds."""
    config = _load(tmp_path, "", "negatives.kind=dns", "train.max_growth=1e3", "train.patience=7")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    settings = read_settings(str(tmp_path / "run"))
    assert (settings.negatives, settings.objective) == ("dns", "softmax")
    assert settings.train == config.train
