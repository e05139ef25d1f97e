"""Means over the steps since the last line of metrics, over all ranks, and the pace of training."""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.training.finite import diverged
from cnsdiff_dist.training.loader import StepInputs


class Meter:
    """Collects what steps return, and for how long they waited for their inputs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self._steps, self._seconds, self._since = 0, 0.0, time.monotonic()
        self._began, self._useful, self._waited = self._since, 0.0, 0.0

    def waited_for(self, steps: Iterator[StepInputs]) -> Iterator[StepInputs]:
        """The same steps; the time until each is there counts as ``data_wait_seconds``."""
        while True:
            began = time.monotonic()
            inputs = next(steps, None)
            self._waited += time.monotonic() - began
            if inputs is None:
                return
            yield inputs

    def add(self, observed: dict[str, Tensor]) -> None:
        """Count a step; nothing was observed of one that was left out."""
        for name, value in observed.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += bool(observed)

    def pause(self) -> None:
        """Stop the clock: evaluations and checkpoints are not training time."""
        self._seconds += time.monotonic() - self._since

    def go_on(self) -> None:
        self._since = time.monotonic()

    def read(self, step: int) -> dict[str, float]:
        """The means since the last reading, and start anew. Collective.

        Returns:
            The observed means; ``samples_per_second`` of all ranks together; ``memory_gib``, the
            most memory that a rank ever held; ``data_wait_seconds``, how long this rank waited
            for its inputs; ``goodput``, the share of this process's time that went into steps
            that count, not into evaluations, checkpoints and steps left out.

        Raises:
            UserError: the loss is not a finite number.
        """
        self.pause()
        self._useful += self._seconds if self._sums else 0.0
        values = {
            "goodput": self._useful / (time.monotonic() - self._began),
            "data_wait_seconds": self._waited,
        }
        if self._sums:
            totals = self._world.sum(torch.stack(list(self._sums.values()))).tolist()
            means = dict(zip(self._sums, totals, strict=True))
            values["samples_per_second"] = means.pop("rows") / self._seconds
            values |= {name: value / self._steps for name, value in means.items()}
            if not math.isfinite(values["loss"]):
                raise diverged(f"the loss is {values['loss']}", step)
        self._sums, self._steps, self._seconds, self._waited = {}, 0, 0.0, 0.0
        self.go_on()
        return {**values, "memory_gib": self._world.peak_memory()}
