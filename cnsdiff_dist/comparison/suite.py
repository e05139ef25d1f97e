"""A suite: which methods are compared on which datasets, and the runs that follow from it.

A suite is a YAML file. Each pair of a dataset and a method is a cell of the comparison and has a
search of its own: every method tries the same number of trials on the first seed, and the best
trial by validation is run on the other seeds.
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
from cnsdiff_dist.config import Config, parse_config
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.plain_yaml import read_yaml
from cnsdiff_dist.sections import Section

Settings = dict[str, Any]
"""Config values by ``section.key``."""

Cell = tuple[str, str]
"""A dataset and a method."""

# Config keys that a suite sets, and from which of its own keys.
_SET_BY_SUITE = {
    "data.url": "datasets.NAME.url",
    "train.select_split": "datasets.NAME.select",
    "run.seed": "seeds",
    "run.dir": "out",
}
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
_Number = Annotated[float, BeforeValidator(lambda value: float(value))]  # YAML reads 1e-4 as text


class Range(Section):
    """An interval that a random search draws from, uniformly or on a log scale."""

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
    """A dataset; ``select`` is the split that chooses checkpoints and trials."""

    url: str
    select: Literal["valid_iid", "valid_ood"] = "valid_iid"
    set: Settings = Field(default_factory=dict)


class MethodEntry(Section):
    """A method, as config values.

    ``search`` replaces the suite's search space, and ``only`` lists the datasets to run it on, all
    by default. An ``ablation`` is a variant of ours and does not count as a rival.
    """

    set: Settings = Field(default_factory=dict)
    search: Space | None = None
    only: list[str] | None = None
    ablation: bool = False


class Suite(Section):
    """The YAML of a suite; ``ours`` is the method that is compared with the best other one."""

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
    """One run of a suite, and whether to run it or to diagnose it once it is finished.

    ``trial`` counts from 0 within the cell; ``values`` are the settings that the trial tries.
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
        out: replaces the suite's own output directory.

    Raises:
        UserError: it cannot be read, has an unknown key or a wrong value, or the methods would
            not have equal budgets.
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
        for cell in cells(suite):
            jobs_of(suite, cell)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return suite


def dump_suite(suite: Suite) -> str:
    return yaml.safe_dump(suite.model_dump(mode="json"), sort_keys=False)


def cells(suite: Suite) -> list[Cell]:
    """Every dataset with every method that is to run on it."""
    return [
        (dataset, method)
        for dataset, method in itertools.product(suite.datasets, suite.methods)
        if (only := suite.methods[method].only) is None or dataset in only
    ]


def jobs_of(suite: Suite, cell: Cell) -> list[list[Job]]:
    """All runs that the search of a cell may need: by trial, then by seed, the first seed first.

    Raises:
        UserError: a config is wrong, or the search has not the suite's number of trials.
    """
    return [
        [_job(suite, cell, index, values, seed) for seed in suite.seeds]
        for index, values in enumerate(trials(suite, cell))
    ]


def trials(suite: Suite, cell: Cell) -> list[Settings]:
    """The settings that a cell tries, ``search.trials`` different ones.

    Raises:
        UserError: the search space does not have as many.
    """
    dataset, method = cell
    space, count = suite.space_of(method), suite.search.trials
    _check_space(space, count, suite.search.kind, method)
    if suite.search.kind == "grid":
        choices: list[list[Any]] = [list(values) for values in space.values()]
        return [dict(zip(space, point)) for point in itertools.product(*choices)]
    return _random_trials(space, count, f"{suite.seeds[0]}/{dataset}/{method}")


def _check_space(space: Space, count: int, kind: str, method: str) -> None:
    for key, values in space.items():
        if values == []:
            raise UserError(f"methods.{method}: the search of {key} has no values")
        if isinstance(values, Range) and kind == "grid":
            raise UserError(f"methods.{method}: {key} is a range; a grid needs a list")
    points = math.prod(
        math.inf if isinstance(values, Range) else len(values) for values in space.values()
    )
    if points < count or (kind == "grid" and points > count):
        raise UserError(
            f"methods.{method}: its search has {points} points, not search.trials={count}: "
            "every method tries equally many"
        )


def _random_trials(space: Space, count: int, key: str) -> list[Settings]:
    """Draw distinct settings, always the same for the same key."""
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


def _job(suite: Suite, cell: Cell, trial: int, values: Settings, seed: int) -> Job:
    dataset, method = cell
    entry = suite.datasets[dataset]
    given: Settings = {"checkpoint.keep": 1}
    sources = {"base": suite.base, f"datasets.{dataset}": entry.set}
    sources |= {f"methods.{method}": suite.methods[method].set, f"methods.{method}.search": values}
    for where, settings in sources.items():
        for key in settings:
            _check_key(key, where)
        given |= settings
    # The directory is named by a hash of the values, not by the trial's number: a suite may gain
    # trials and keep its finished runs.
    mark = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    given |= {
        "data.url": entry.url,
        "train.select_split": entry.select,
        "run.seed": seed,
        "run.dir": f"{suite.out.rstrip('/')}/runs/{dataset}/{method}/trial-{mark}-seed-{seed}",
    }
    config = parse_config(_nested(given), f"{dataset}, {method}")
    return Job(dataset, method, trial, values, seed, config)


def _check_key(key: str, where: str) -> None:
    if key in _SET_BY_SUITE:
        raise UserError(f"{where}: {key} comes from the suite's {_SET_BY_SUITE[key]}")
    if key.count(".") != 1:
        raise UserError(f"{where}: {key!r} is not a config key; write section.key")


def _nested(settings: Settings) -> dict[str, Any]:
    """The settings as the tree of sections that a config is."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        section, leaf = key.split(".")
        tree.setdefault(section, {})[leaf] = value
    return tree


def _explain(error: ValidationError) -> str:
    """The first error in one line that names its key."""
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
