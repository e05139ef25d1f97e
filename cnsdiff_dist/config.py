"""The typed config tree: YAML, overridden by ``key=value`` words, validated once.

Every field says what it means and its unit. An unknown key is an error that names the
nearest known one; nothing is silently ignored.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cnsdiff_dist.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    url: str = Field("", description="prepared dataset directory, any fsspec URL")
    streams: int = Field(8, ge=1, description="canonical streams; every world size must divide it")
    block_rows: int = Field(65_536, ge=1, description="rows of a stream that are shuffled together")
    prefetch_blocks: int = Field(2, ge=1, description="blocks read ahead of the step")
    workers: int = Field(1, ge=1, description="threads that sample for the steps ahead")


class Run(Section):
    dir: str = Field("", description="run directory, any fsspec URL; default runs/CONFIG-NAME")
    seed: int = Field(0, ge=0, lt=2**31)
    timeout_seconds: int = Field(600, ge=1, description="a collective that waits longer fails")
    retry_seconds: int = Field(
        300, ge=0, description="how long a store that does not answer is tried again; must be less "
        "than timeout_seconds, which the other ranks wait",
    )  # fmt: skip
    grace_seconds: int = Field(
        25, ge=1, description="after SIGTERM, to checkpoint; torchrun and Kubernetes kill after 30",
    )  # fmt: skip
    metrics_port: int = Field(
        0, ge=0, lt=65536, description="rank 0 serves its metrics there to Prometheus; 0 for none"
    )

    @model_validator(mode="after")
    def _peers_outwait_retries(self) -> Self:
        if self.retry_seconds >= self.timeout_seconds:
            raise ValueError(
                f"retry_seconds ({self.retry_seconds}) must be less than timeout_seconds "
                f"({self.timeout_seconds}): a rank would be given up while it tries again"
            )
        return self


class Model(Section):
    dim: int = Field(64, ge=4, multiple_of=4, description="embedding dimension D")
    layers: int = Field(2, ge=0, description="LightGCN layers L; 0 is matrix factorisation")
    propagation: Literal["auto", "full", "sampled"] = Field(
        "auto", description="over the whole graph at every step, or over sampled neighbours; auto "
        "samples above 100,000 nodes",
    )  # fmt: skip
    fan_out: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (15, 10), description="sampled: neighbours kept of a node, hop by hop"
    )

    @model_validator(mode="after")
    def _a_fan_out_per_layer(self) -> Self:
        if self.propagation != "full" and len(self.fan_out) < self.layers:
            raise ValueError(
                f"fan_out has {len(self.fan_out)} hops for {self.layers} layers; name one per layer"
            )
        return self


class Tables(Section):
    sharding: Literal["row_wise", "table_wise", "column_wise"] = "row_wise"
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam"] = Field(
        "rowwise_adagrad", description="fused into backward; the two Adams need a GPU"
    )
    lr: float = Field(0.05, gt=0)
    eps: float = Field(1e-8, gt=0)
    init_std: float = Field(0.01, gt=0, description="standard deviation of the initial rows")
    user_dtype: Literal["fp32", "fp16"] = Field("fp32", description="of the user table's rows")
    item_dtype: Literal["fp32", "fp16"] = Field("fp32", description="of the item table's rows")
    placement: Literal["device", "uvm"] = Field(
        "device", description="uvm: rows in host memory, cached in the GPU's; needs a GPU"
    )

    def dtype(self, table: str) -> str:
        return self.user_dtype if table == "user" else self.item_dtype

    @model_validator(mode="after")
    def _state_can_be_resharded(self) -> Self:
        if self.sharding == "column_wise" and "rowwise" in self.optimizer:
            raise ValueError(
                "column_wise needs optimizer adagrad or sgd: a state per row, kept by each of "
                "the row's shards, would depend on the world size"
            )
        return self


class Objective(Section):
    kind: Literal["bpr", "softmax"] = "softmax"
    similarity: Literal["dot", "cosine"] = "cosine"
    temperature: float = Field(0.2, gt=0, description="scores are divided by it")


class Negatives(Section):
    kind: Literal[
        "uniform", "popularity", "in_batch", "mixed", "dns", "dns_mn", "softmax", "mixgcf", "dens",
        "ahns", "srns", "dmns", "cnsdiff_published", "cnsdiff",
    ] = "cnsdiff"  # fmt: skip
    count: int = Field(1, ge=1, description="negatives a row, of uniform, popularity and mixed")
    candidates: int = Field(8, ge=2, description="M, a row's pool that hard samplers pick from")
    gamma: float = Field(0.75, ge=0, description="popularity: p(i) ~ degree(i)^gamma")
    log_q: bool = Field(False, description="in_batch, mixed: subtract log q(i) from the logits")
    top: int = Field(4, ge=1, description="dns_mn: N, one of the top N of M at random")
    rho: float = Field(1.0, gt=0, description="softmax: temperature of the choice among M")
    hardness: float = Field(0.5, gt=0, description="ahns: beta; srns: weight of the variance")
    share: Literal["row", "group"] = Field(
        "group", description="who sees a generated negative; group: one pool with the positives"
    )
    margin: float | None = Field(
        0.3, description="group: a row leaves out generated vectors whose cosine with the user is "
        "above the positive's minus this; null for none",
    )  # fmt: skip
    mix_start: tuple[float, float] = Field((3.0, 7.0), description="Beta(a, b) of lambda at first")
    mix_end: tuple[float, float] = Field((3.0, 7.0), description="Beta(a, b) of lambda at last")

    @model_validator(mode="after")
    def _beta_is_positive(self) -> Self:
        if min(*self.mix_start, *self.mix_end) <= 0:
            raise ValueError("mix_start and mix_end are the parameters of a Beta: both above 0")
        if self.kind == "dns_mn" and self.top > self.candidates:
            raise ValueError(f"top ({self.top}) of {self.candidates} candidates: at most all")
        return self


class Generator(Section):
    steps: int = Field(20, ge=2, description="T, the number of diffusion steps")
    schedule: Literal["cosine", "linear", "linear-var"] = "cosine"
    levels: tuple[int, ...] = Field((20,), description="noise levels of the candidates")
    condition: tuple[Literal["user", "environment"], ...] = ("environment",)
    hidden: int = Field(64, ge=1, description="width of the denoiser")
    train_share: float = Field(0.25, gt=0, le=1, description="rows of a batch it learns from")
    lr: float = Field(0.002, gt=0, description="Adam's learning rate")
    snr_clip: float = Field(5.0, gt=0, description="upper bound of the SNR weights")
    detach: bool = Field(True, description="keep the diffusion loss out of the tables")
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    gradient_clip: float = Field(1.0, ge=0, description="0 for none")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.condition)) < len(self.condition):
            raise ValueError("condition names user and environment at most once each")
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise ValueError("levels must be ascending noise levels, each once")
        if self.levels[0] < 1 or self.levels[-1] > self.steps:
            raise ValueError(f"levels must lie in 1..steps ({self.steps})")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1, 2 or 3: stage 0 keeps no fp32 master copy")
        return self


class Loss(Section):
    contrastive: float = Field(0.0, ge=0, description="w_cl")
    temperature: float = Field(2.0, gt=0, description="of the contrastive term")
    positive_noise: float = Field(0.1, ge=0, description="std of the noise on its positive")
    diffusion: float = Field(1.0, ge=0, description="w_diff")
    causal: float = Field(0.1, ge=0, description="w_causal, inside the diffusion loss")
    l2: float = Field(1e-4, ge=0)


class Train(Section):
    epochs: int = Field(30, ge=1)
    max_steps: int = Field(0, ge=0, description="end after so many steps; 0: when epochs end")
    batch: int = Field(2048, ge=1, description="rows of a global step, over all ranks")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up of both learning rates")
    select_split: Literal["valid_iid", "valid_ood"] = "valid_iid"
    select_metric: str = Field("recall@20", pattern=r"^(recall|ndcg|hit|precision)@[1-9][0-9]*$")
    patience: int = Field(4, ge=1, description="evaluations without a better one before stopping")
    evaluations_per_epoch: int = Field(1, ge=1)
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    non_finite: Literal["stop", "skip"] = Field(
        "stop", description="when loss or gradient is not finite on some rank: end the run, or "
        "leave the step out on all and count it (10 in a row end the run)",
    )  # fmt: skip
    max_growth: float = Field(
        100.0, ge=0, description="end the run when the mean loss is above so many times its first "
        "value; 0 for never",
    )  # fmt: skip


class Checkpoint(Section):
    every_steps: int = Field(0, ge=0, description="0: only when the model is evaluated")
    background: bool = Field(
        True, description="write behind the next steps, from a copy on the host of what is saved"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept, besides the best")


class Evaluation(Section):
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 20), min_length=1, description="lengths of the lists that are evaluated"
    )
    alphas: tuple[float, ...] = Field(
        (0.0, 0.5, 1.0), min_length=1,
        description="environment adjustments tried at each validation; the best one counts",
    )  # fmt: skip
    users_per_chunk: int = Field(256, ge=1)


class Config(Section):
    data: Data = Data()
    run: Run = Run()
    model: Model = Model()
    tables: Tables = Tables()
    objective: Objective = Objective()
    negatives: Negatives = Negatives()
    generator: Generator = Generator()
    loss: Loss = Loss()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()

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
    """Read a YAML file and apply ``section.key=value`` overrides (values are YAML).

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
    for word in overrides:
        _override(tree, word)
    return parse_config(tree, path)


class _Plain(yaml.SafeLoader):
    """Without aliases: no config needs one, and a few can stand for gigabytes or themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*..); write out what it stands for")
        return super().compose_node(parent, index)


def read_yaml(text: str, where: str, aliases: bool = False) -> Any:
    """YAML of plain values; with ``aliases`` only where its author is trusted.

    Raises:
        UserError: it is not.
    """
    try:
        return yaml.load(text, yaml.SafeLoader if aliases else _Plain)
    except RecursionError:
        raise UserError(f"{where}: not YAML: nested too deeply") from None
    # PyYAML lets what its constructors raise pass: dates and numbers out of range, odd tags.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: not YAML: {error}") from None


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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"'{word}': an override is written section.key=value")
    value = read_yaml(text, f"'{word}'")
    *sections, leaf = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{word}': {section} is not a section")
        tree = inner
    tree[leaf] = value


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
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys()
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "see `cnsdiff train --help-config`"
        return f"unknown key {key}; {hint}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is a section; write {key}.KEY=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    got = first.get("input")
    try:
        shown = "" if isinstance(got, dict | BaseModel) else f", not {got!r}"
    except ValueError:  # Python prints no number of more than 4300 digits
        shown = ", not a number of thousands of digits"
    return f"{key + ': ' if key else ''}{message[0].lower()}{message[1:]}{shown}"


def _known_keys() -> list[str]:
    return [f"{section}.{key}" for section, key, _, _ in describe_config()] + list(
        Config.model_fields
    )


def describe_config() -> list[tuple[str, str, Any, str]]:
    """(section, key, default, description) of every key, in order."""
    rows = []
    for section, field in Config.model_fields.items():
        for key, inner in type(field.default).model_fields.items():
            texts = (inner.description, " | ".join(_choices(inner.annotation)))
            rows.append((section, key, inner.default, "; ".join(filter(None, texts))))
    return rows


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, also inside a tuple."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]
