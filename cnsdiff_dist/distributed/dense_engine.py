"""The DeepSpeed engine that trains the generator. No other module imports deepspeed.

The engine gets the dense module only, never the embedding tables: its broadcast would overwrite
their shards. ``backward`` goes through the engine, and the gradients flow on into the tables.
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from cnsdiff_dist.sections import Generator

State = dict[str, dict[str, Tensor]]
"""Parameter name -> its full ``value``, ``exp_avg``, ``exp_avg_sq`` and Adam's ``step``."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DenseEngine:
    """Trains a module by data parallelism under ZeRO; without a module it only backpropagates."""

    def __init__(self, module: nn.Module | None, config: Generator, rows_per_rank: int) -> None:
        self._lr, self._stage = config.lr, config.zero_stage
        self._engine = _initialize(module, config, rows_per_rank) if module else None
        if self._engine is not None:
            self._create_adam_state()

    @property
    def network(self) -> nn.Module | None:
        """The module, wrapped by the engine: the sampler must call it in this form."""
        return self._engine

    def backward(self, loss: Tensor) -> None:
        if self._engine is None:
            loss.backward()
        else:
            self._engine.backward(loss)

    def step(self) -> None:
        if self._engine is not None:
            self._engine.step()

    def discard_gradients(self) -> None:
        """Forget the gradients of the last :meth:`backward`, after which no step follows."""
        if self._engine is None:
            return
        optimizer = self._engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        # ZeRO keeps more of a backward; its own handling of an overflow clears the same fields.
        if self._stage > 0:
            optimizer.averaged_gradients = {}
        if self._stage in (1, 2):
            optimizer.all_grad_tensors = {}
            optimizer.micro_step_id = -1

    def scale_lr(self, factor: float) -> None:
        """Set the learning rate of the next step to ``factor`` x the configured one."""
        if self._engine is not None:
            for group in self._adam.param_groups:
                group["lr"] = self._lr * factor

    def state(self) -> State:
        """Return the full float32 parameters and Adam moments by name. Collective.

        They have the same form at any ZeRO stage and world size.
        """
        if self._engine is None:
            return {}
        step = next(iter(self._adam.state.values()))["step"].detach().clone()
        return {
            name: {
                "value": self._full(parameter, None),
                "step": step,
                **{moment: self._full(parameter, moment) for moment in _MOMENTS},
            }
            for name, parameter in self._engine.module.named_parameters()
        }

    def load_state(self, state: State) -> None:
        """Overwrite parameters and moments with what :meth:`state` returned. Collective."""
        if self._engine is None:
            return
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self._engine.module.named_parameters():
            saved = state[name]
            # The copy that computes (whole or partitioned) is apart from the fp32 master copy.
            with torch.no_grad(), deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.data.copy_(saved["value"])
            if self._stage == 0:
                for moment in _MOMENTS:
                    self._adam.state[parameter][moment].copy_(saved[moment])
            else:
                safe_set_full_fp32_param(parameter, saved["value"])
                for moment in _MOMENTS:
                    safe_set_full_optimizer_state(parameter, saved[moment], moment)
        for entry in self._adam.state.values():
            entry["step"].copy_(saved["step"])

    def _full(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            source = parameter if moment is None else self._adam.state[parameter][moment]
            return source.detach().float().clone()
        if moment is None:
            return safe_get_full_fp32_param(parameter).detach().float().clone()
        return safe_get_full_optimizer_state(parameter, moment).detach().float().clone()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        optimizer: Any = self._engine.optimizer  # type: ignore[union-attr]
        return optimizer if self._stage == 0 else optimizer.optimizer

    def _create_adam_state(self) -> None:
        """Create what Adam creates at its first step: a checkpoint may be loaded before that."""
        zero: Any = self._engine.optimizer  # type: ignore[union-attr]
        if self._stage == 0:
            flat = list(self._engine.module.parameters())  # type: ignore[union-attr]
        elif self._stage == 3:
            flat = zero.fp32_partitioned_groups_flat
        else:
            flat = zero.single_partition_of_fp32_groups
        for parameter in flat:
            self._adam.state[parameter] = {
                "step": torch.zeros(()),
                **{moment: torch.zeros_like(parameter.data) for moment in _MOMENTS},
            }
        if self._stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()


def _initialize(module: nn.Module, config: Generator, rows_per_rank: int) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed

    # DeepSpeed would compile this operator at start, with a race between ranks; gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    options = _deepspeed_config(config, rows_per_rank)
    engine, *_ = deepspeed.initialize(model=module, config=options, dist_init_required=False)
    return engine


def _deepspeed_config(config: Generator, rows_per_rank: int) -> dict[str, Any]:
    adam = {"lr": config.lr, "torch_adam": True, "adam_w_mode": False}
    return {
        "train_micro_batch_size_per_gpu": rows_per_rank,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clip,
        "optimizer": {"type": "Adam", "params": adam},
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 2**31 - 1,
    }
