"""A suite: which methods are compared on which datasets, and the runs that this makes.

Every method tries the same number of trials on each dataset, on the first seed; the best by
validation is run on the other seeds.
"""

import hashlib
import itertools
import json
import math
import random
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from cnsdiff_dist import storage
from cnsdiff_dist.config import Config, Section, parse_config, read_yaml
from cnsdiff_dist.errors import UserError

Settings = dict[str, Any]
"""Config values by ``section.key``."""

_OWNED = {
    "data.url": "datasets.NAME.url", "train.select_split": "datasets.NAME.select",
    "run.seed": "seeds", "run.dir": "out",
}  # fmt: skip
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
_Number = Annotated[float, BeforeValidator(lambda value: float(value))]  # YAML reads 1e-4 as text


class Range(Section):
    """Numbers to draw from, for a random search."""

    low: _Number
    high: _Number
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("a range needs low below high, and above 0 when it is log")
        return self


Space = dict[str, list[Any] | Range]


class Search(Section):
    kind: Literal["grid", "random"] = "grid"
    trials: int = Field(1, ge=1)
    space: Space = Field(default_factory=dict)


class DatasetEntry(Section):
    url: str
    select: Literal["valid_iid", "valid_ood"] = "valid_iid"
    set: Settings = Field(default_factory=dict)


class MethodEntry(Section):
    """``only``: the datasets it is run on, all by default. ``ablation``: a variant of ours,
    that is no rival."""

    set: Settings = Field(default_factory=dict)
    search: Space | None = None
    only: list[str] | None = None
    ablation: bool = False


class Suite(Section):
    name: _Name
    out: str = ""
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1)
    base: Settings = Field(default_factory=dict)
    datasets: dict[_Name, DatasetEntry] = Field(min_length=1)
    methods: dict[_Name, MethodEntry] = Field(min_length=1)
    search: Search = Search()
    ours: str

    @field_validator("seeds")
    @classmethod
    def _once_each(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is there twice")
        return seeds

    @model_validator(mode="after")
    def _ours_is_a_method(self) -> Self:
        if self.ours not in self.methods:
            raise ValueError(f"ours ({self.ours}) is none of the methods {', '.join(self.methods)}")
        for name, method in self.methods.items():
            if strangers := set(method.only or []) - set(self.datasets):
                raise ValueError(f"methods.{name}.only: {min(strangers)} is none of the datasets")
        return self

    def space_of(self, method: str) -> Space:
        own = self.methods[method].search
        return self.search.space if own is None else own


@dataclass(frozen=True)
class Job:
    """One run of a suite: ``trial`` counts from 0 within the dataset and method.

    ``task`` is what is to be done with it: the run itself, or the diagnosis of a finished one.
    """

    dataset: str
    method: str
    trial: int
    values: Settings
    seed: int
    config: Config
    task: Literal["run", "diagnose"] = "run"

    @property
    def url(self) -> str:
        return self.config.run.dir

    @property
    def label(self) -> str:
        return f"{self.dataset} {self.method} trial {self.trial} seed {self.seed}"


def load_suite(path: str, out: str | None = None) -> Suite:
    """Read a suite and check the config of every run that it makes.

    Args:
        out: overrides the suite's own.

    Raises:
        UserError: unreadable, an unknown key, a wrong value, or unequal budgets.
    """
    where = storage.display(path)
    tree = read_yaml(storage.read_text(path), where, aliases=True)
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a suite is a mapping; configs/suites/ has an example")
    if out:
        tree["out"] = out
    try:
        suite = Suite.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    if not suite.out:
        suite = suite.model_copy(update={"out": f"runs/{suite.name}"})
    try:
        for dataset, method in groups(suite):
            jobs_of(suite, dataset, method)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return suite


def dump_suite(suite: Suite) -> str:
    return yaml.safe_dump(suite.model_dump(mode="json"), sort_keys=False)


def groups(suite: Suite) -> list[tuple[str, str]]:
    """(dataset, method): each of these has a search of its own."""
    return [
        (dataset, method)
        for dataset, method in itertools.product(suite.datasets, suite.methods)
        if (only := suite.methods[method].only) is None or dataset in only
    ]


def jobs_of(suite: Suite, dataset: str, method: str) -> list[list[Job]]:
    """The runs that a search may need: by trial, then by seed, the first seed first.

    Raises:
        UserError: a config is wrong, or the search has not the suite's number of trials.
    """
    return [
        [_job(suite, dataset, method, index, values, seed) for seed in suite.seeds]
        for index, values in enumerate(trials(suite, dataset, method))
    ]


def trials(suite: Suite, dataset: str, method: str) -> list[Settings]:
    """What a method tries on a dataset: ``search.trials`` settings, each once.

    Raises:
        UserError: the space has not that many.
    """
    space, count = suite.space_of(method), suite.search.trials
    for key, values in space.items():
        if values == []:
            raise UserError(f"methods.{method}: the search of {key} has no values")
        if isinstance(values, Range) and suite.search.kind == "grid":
            raise UserError(f"methods.{method}: {key} is a range; a grid needs a list")
    points = math.prod(
        math.inf if isinstance(values, Range) else len(values) for values in space.values()
    )
    if points < count or (suite.search.kind == "grid" and points > count):
        raise UserError(
            f"methods.{method}: its search has {points} points, not search.trials={count}: "
            "every method tries equally many"
        )
    if suite.search.kind == "grid":
        choices: list[list[Any]] = [list(values) for values in space.values()]
        return [dict(zip(space, point)) for point in itertools.product(*choices)]
    return _random_trials(space, count, f"{suite.seeds[0]}/{dataset}/{method}")


def _random_trials(space: Space, count: int, key: str) -> list[Settings]:
    """Distinct draws, the same for the same key."""
    generator = random.Random(hashlib.sha256(key.encode()).digest())
    found: list[Settings] = []
    while len(found) < count:
        drawn = {name: _draw(values, generator) for name, values in space.items()}
        if drawn not in found:
            found.append(drawn)
    return found


def _draw(values: list[Any] | Range, generator: random.Random) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    if values.log:
        return math.exp(generator.uniform(math.log(values.low), math.log(values.high)))
    return generator.uniform(values.low, values.high)


def _job(
    suite: Suite, dataset: str, method: str, index: int, values: Settings, seed: int
) -> Job:  # fmt: skip
    entry = suite.datasets[dataset]
    given: Settings = {"checkpoint.keep": 1}
    sources = {"base": suite.base, f"datasets.{dataset}": entry.set}
    sources |= {f"methods.{method}": suite.methods[method].set, f"methods.{method}.search": values}
    for where, settings in sources.items():
        for key in settings:
            _check_key(key, where)
        given |= settings
    # Named by its values, so that a suite may gain trials and keep the runs it has.
    mark = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    given |= {
        "data.url": entry.url,
        "train.select_split": entry.select,
        "run.seed": seed,
        "run.dir": f"{suite.out.rstrip('/')}/runs/{dataset}/{method}/trial-{mark}-seed-{seed}",
    }
    config = parse_config(_nested(given), f"{dataset}, {method}")
    return Job(dataset, method, index, values, seed, config)


def _check_key(key: str, where: str) -> None:
    if key in _OWNED:
        raise UserError(f"{where}: {key} comes from the suite's {_OWNED[key]}")
    if key.count(".") != 1:
        raise UserError(f"{where}: {key!r} is not a config key; write section.key")


def _nested(settings: Settings) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        section, leaf = key.split(".")
        tree.setdefault(section, {})[leaf] = value
    return tree


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; configs/suites/ has an example"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    got = first.get("input")
    shown = "" if isinstance(got, dict | Section) else f", not {got!r}"
    return f"{key + ': ' if key else ''}{message[0].lower()}{message[1:]}{shown}"
