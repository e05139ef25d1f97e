from pathlib import Path

import pytest
import yaml

from cnsdiff_dist.config import Config, describe_config, dump_config, load_config, parse_config
from cnsdiff_dist.errors import UserError

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
    listed = {f"{section}.{key}" for section, key, _, _ in describe_config()}
    tree = Config().model_dump()
    assert listed == {f"{section}.{key}" for section in tree for key in tree[section]}
