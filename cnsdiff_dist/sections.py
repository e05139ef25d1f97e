"""The sections of a config: which keys there are, what they mean, and their units.

A component takes the section that configures it, never the whole tree. Samplers and objectives
add the keys of their kind in their own files; :mod:`cnsdiff_dist.config` puts the tree together.
Nothing here imports torch.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """One section of a config: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """What is trained on, and how it is streamed."""

    url: str = Field("", description="prepared dataset directory, any fsspec URL")
    streams: int = Field(8, ge=1, description="canonical streams; every world size must divide it")
    block_rows: int = Field(65_536, ge=1, description="rows of a stream that are shuffled together")
    prefetch_blocks: int = Field(2, ge=1, description="blocks read ahead of the step")
    workers: int = Field(1, ge=1, description="threads that sample for the steps ahead")


class Run(Section):
    """Where a run lies, and how patient it is."""

    dir: str = Field("", description="run directory, any fsspec URL; default runs/CONFIG-NAME")
    seed: int = Field(0, ge=0, lt=2**31)
    timeout_seconds: int = Field(600, ge=1, description="a collective that waits longer fails")
    retry_seconds: int = Field(
        300,
        ge=0,
        description="how long a store that does not answer is tried again; must be less "
        "than timeout_seconds, which the other ranks wait",
    )
    grace_seconds: int = Field(
        25, ge=1, description="after SIGTERM, to checkpoint; torchrun and Kubernetes kill after 30"
    )
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
    """The encoder."""

    dim: int = Field(64, ge=4, multiple_of=4, description="embedding dimension D")
    layers: int = Field(2, ge=0, description="LightGCN layers L; 0 is matrix factorisation")
    propagation: Literal["auto", "full", "sampled"] = Field(
        "auto",
        description="over the whole graph at every step, or over sampled neighbours; auto "
        "samples above 100,000 nodes",
    )
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
    """The embedding tables, their optimizer and where their rows lie."""

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
    """What every objective has; ``objective.kind`` chooses one of :mod:`cnsdiff_dist.objectives`,
    which may add keys of its own."""

    kind: str
    similarity: Literal["dot", "cosine"] = "cosine"
    temperature: float = Field(0.2, gt=0, description="scores are divided by it")


class Negatives(Section):
    """What every sampler has; ``negatives.kind`` chooses one of :mod:`cnsdiff_dist.samplers`,
    which may add keys of its own."""

    kind: str


class Generator(Section):
    """The diffusion model, of samplers that have one, and the engine of any network."""

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
    """Weights of the terms beside the objective."""

    contrastive: float = Field(0.0, ge=0, description="w_cl")
    temperature: float = Field(2.0, gt=0, description="of the contrastive term")
    positive_noise: float = Field(0.1, ge=0, description="std of the noise on its positive")
    diffusion: float = Field(1.0, ge=0, description="w_diff")
    causal: float = Field(0.1, ge=0, description="w_causal, inside the diffusion loss")
    l2: float = Field(1e-4, ge=0)


class Train(Section):
    """How long to train, and what selects the best checkpoint."""

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
        "stop",
        description="when loss or gradient is not finite on some rank: end the run, or "
        "leave the step out on all and count it (10 in a row end the run)",
    )
    max_growth: float = Field(
        100.0,
        ge=0,
        description="end the run when the mean loss is above so many times its first "
        "value; 0 for never",
    )


class Checkpoint(Section):
    """When to save, and what to keep."""

    every_steps: int = Field(0, ge=0, description="0: only when the model is evaluated")
    background: bool = Field(
        True, description="write behind the next steps, from a copy on the host of what is saved"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept, besides the best")


class Evaluation(Section):
    """How a split is ranked."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 20), min_length=1, description="lengths of the lists that are evaluated"
    )
    alphas: tuple[float, ...] = Field(
        (0.0, 0.5, 1.0),
        min_length=1,
        description="environment adjustments tried at each validation; the best one counts",
    )
    users_per_chunk: int = Field(256, ge=1)
