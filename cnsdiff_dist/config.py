"""The config tree: YAML, overridden by ``section.key=value`` words, validated once.

An unknown key is an error that names the nearest known one; nothing is silently ignored. The
sections ``negatives`` and ``objective`` have the keys of their ``kind`` alone, which the sampler
or objective of that kind declares.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, Discriminator, Tag, ValidationError, model_validator

from cnsdiff_dist import sections
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.objectives.registry import OBJECTIVES
from cnsdiff_dist.objectives.softmax import SoftmaxSettings
from cnsdiff_dist.plain_yaml import read_yaml
from cnsdiff_dist.samplers.cnsdiff import CNSDiffSettings
from cnsdiff_dist.samplers.registry import SAMPLERS

KINDS: dict[str, dict[str, type[sections.Section]]] = {
    "negatives": {kind: sampler.settings_type for kind, sampler in SAMPLERS.items()},
    "objective": {kind: objective.settings_type for kind, objective in OBJECTIVES.items()},
}
"""Section -> kind -> the keys of that kind, of the sections whose ``kind`` chooses their keys."""


def _by_kind(section: str, default: str) -> Any:
    """The type of a section that is validated as its ``kind`` says, or as ``default``."""

    def kind_of(value: Any) -> str | None:
        given = isinstance(value, dict)
        found = value.get("kind", default) if given else getattr(value, "kind", None)
        return found if isinstance(found, str) else None

    tagged = [Annotated[keys, Tag(kind)] for kind, keys in KINDS[section].items()]
    return Annotated[reduce(or_, tagged), Discriminator(kind_of)]


if TYPE_CHECKING:
    from cnsdiff_dist.sections import Negatives, Objective
else:
    Negatives = _by_kind("negatives", "cnsdiff")
    Objective = _by_kind("objective", "softmax")


class Config(sections.Section):
    """The whole tree, as ``cnsdiff train --help-config`` lists it."""

    data: sections.Data = sections.Data()
    run: sections.Run = sections.Run()
    model: sections.Model = sections.Model()
    tables: sections.Tables = sections.Tables()
    objective: Objective = SoftmaxSettings()
    negatives: Negatives = CNSDiffSettings()
    generator: sections.Generator = sections.Generator()
    loss: sections.Loss = sections.Loss()
    train: sections.Train = sections.Train()
    checkpoint: sections.Checkpoint = sections.Checkpoint()
    evaluation: sections.Evaluation = sections.Evaluation()

    @model_validator(mode="after")
    def _batch_is_dealt_evenly(self) -> Self:
        if self.train.batch % self.data.streams:
            raise ValueError(
                f"train.batch ({self.train.batch}) must be a multiple of data.streams "
                f"({self.data.streams})"
            )
        metric_k = int(self.train.select_metric.split("@")[1])
        if metric_k not in self.evaluation.k:
            raise ValueError(f"train.select_metric needs K={metric_k} in evaluation.k")
        return self


def load_config(path: str, overrides: list[str]) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides, whose values are YAML.

    An override of ``negatives.kind`` or ``objective.kind`` drops those keys of the file that the
    chosen kind does not have: they belong to the kind that the file chose.

    Raises:
        UserError: unreadable file, not a mapping, unknown key or wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; presets are in configs/") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one; so is a NUL in the path
        raise UserError(f"{path}: cannot be read as YAML: {error}") from None
    tree = read_yaml(text, path) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of sections, not {type(tree).__name__}")
    # The kinds first, so that the order of the words does not matter.
    for word in sorted(overrides, key=lambda word: _kind_section(word) is None):
        _override(tree, word)
        if section := _kind_section(word):
            drop_other_kinds(tree, section)
    return parse_config(tree, path)


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validate a config tree.

    Raises:
        UserError: unknown key or wrong value, naming the key.
    """
    try:
        return Config.model_validate(_numbers_and_tuples(tree))
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """The config as YAML that :func:`parse_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"'{word}': an override is written section.key=value")
    value = read_yaml(text, f"'{word}'")
    *parents, leaf = key.split(".")
    for section in parents:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{word}': {section} is not a section")
        tree = inner
    tree[leaf] = value


def _kind_section(word: str) -> str | None:
    """``negatives`` of ``negatives.kind=dns``; None of a word that chooses no kind."""
    section, _, key = word.partition("=")[0].partition(".")
    return section if key == "kind" and section in KINDS else None


def drop_other_kinds(tree: dict[str, Any], section: str) -> None:
    """Drop the keys of a section that other kinds have and the chosen one has not."""
    known, values = KINDS[section], tree.get(section)
    if isinstance(values, dict) and str(values.get("kind")) in known:
        own = known[str(values["kind"])].model_fields
        foreign = {key for keys in known.values() for key in keys.model_fields} - set(own)
        tree[section] = {key: value for key, value in values.items() if key not in foreign}


def _numbers_and_tuples(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text and has no tuples; strict validation wants both right."""
    if isinstance(value, dict):
        return {key: _numbers_and_tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_numbers_and_tuples(inner) for inner in value)
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    """The first error in one line that names its key."""
    first = error.errors()[0]
    section, *rest = [str(part) for part in first["loc"]] or [""]
    kind = rest.pop(0) if section in KINDS and rest else None
    key = ".".join([section, *rest])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; {_hint(section, kind, key)}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is a section; write {key}.KEY=VALUE"
    if first["type"].startswith("union_tag"):
        if not isinstance(first["input"], dict):
            return f"{key} is a section; write {key}.KEY=VALUE"
        got = first["input"].get("kind")
        return f"{key}.kind: one of {', '.join(KINDS[section])}, not {_shown(got)}"
    message = first["msg"].removeprefix("Value error, ")
    got = first.get("input")
    shown = "" if isinstance(got, dict | BaseModel) else f", not {_shown(got)}"
    return f"{key + ': ' if key else ''}{message[0].lower()}{message[1:]}{shown}"


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits
        return "a number of thousands of digits"


def _hint(section: str, kind: str | None, key: str) -> str:
    """What to write instead of an unknown key."""
    names = [name for name, *_ in _all_keys()]
    if kind is not None:
        own = [f"{section}.{name}" for name in KINDS[section][kind].model_fields]
        if key in names:
            return f"{section}.kind={kind} has only {', '.join(own)}"
        names = own
    close = difflib.get_close_matches(key, [*names, *Config.model_fields], n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "see `cnsdiff train --help-config`"


@dataclass(frozen=True)
class ConfigKey:
    """A key as ``--help-config`` shows it; ``name`` is section.key."""

    name: str
    default: Any
    description: str


def describe_config() -> list[ConfigKey]:
    """Every key, in order. One that several kinds share is there once, and names them."""
    kinds_of: dict[tuple[str, str, str], list[str]] = {}
    found: dict[tuple[str, str, str], ConfigKey] = {}
    for name, field, kind in _all_keys():
        key = _described(name, field)
        same = (key.name, str(key.default), key.description)
        found.setdefault(same, key)
        kinds_of.setdefault(same, []).extend([kind] if kind else [])
    return [_with_kinds(key, kinds_of[same]) for same, key in found.items()]


def _described(name: str, field: Any) -> ConfigKey:
    section, _, key = name.partition(".")
    if key == "kind":
        return ConfigKey(name, getattr(Config(), section).kind, " | ".join(KINDS[section]))
    texts = (field.description, " | ".join(_choices(field.annotation)))
    return ConfigKey(name, field.default, "; ".join(filter(None, texts)))


def _with_kinds(key: ConfigKey, kinds: list[str]) -> ConfigKey:
    """The key with the kinds that have it in its description, unless all have it."""
    if not kinds or len(kinds) == len(KINDS[key.name.partition(".")[0]]):
        return key
    return replace(key, description=f"{key.description} (of {', '.join(kinds)})".strip())


def _all_keys() -> Iterator[tuple[str, Any, str | None]]:
    """(section.key, its field, the kind that has it if kinds differ), in order."""
    for section, field in Config.model_fields.items():
        variants: Mapping[str | None, Any] = {None: type(field.default)}
        for kind, keys in KINDS.get(section, variants).items():
            for key, inner in keys.model_fields.items():
                yield f"{section}.{key}", inner, kind


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, also inside a tuple."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]
