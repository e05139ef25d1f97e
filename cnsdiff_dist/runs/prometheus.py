"""The metrics of a training over HTTP, for Prometheus. Rank 0 only.

A metric without a value yet is not served: a loss of 0 before the first step, or a checkpoint of
1970, would set off alarms.
"""

import time
from collections.abc import Iterator
from typing import Any, Self

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from cnsdiff_dist.checkpoint.commit import Commit
from cnsdiff_dist.errors import UserError

_COUNTERS = {
    "steps": "Steps taken by this process, those left out included",
    "data_wait_seconds": "Time that steps of rank 0 waited for their rows",
    "checkpoint_wait_seconds": "Time that steps stood still for a checkpoint",
    "read_retries": "Reads and writes of rank 0 that were tried again",
    "skipped_steps": "Steps of the run left out because loss or gradient was not finite",
}
_GAUGES = {
    "step": "Steps of the whole training that are done",
    "planned_steps": "Steps of the whole training",
    "epoch": "The epoch of the last line logged, from 0",
    "loss": "Mean loss of the steps since the line before",
    "samples_per_second": "Rows trained on a second by all ranks, without evaluations",
    "goodput_ratio": "Share of this process's time that went into steps that count",
    "peak_memory_bytes": "The most memory that a rank ever held: of its GPU, or of its process",
    "last_log_timestamp_seconds": "When the last line was logged",
    "last_checkpoint_timestamp_seconds": "When the newest checkpoint was committed",
    "last_checkpoint_write_seconds": "Time from its copy to its commit",
    "last_checkpoint_size_bytes": "Its size, of all ranks",
    "last_checkpoint_step": "Its step",
}
_AS_LOGGED = ("loss", "samples_per_second", "read_retries", "skipped_steps")


class MetricsServer(Collector):
    """Serves the metrics while it is entered, on all interfaces.

    The threads of the server read the values while the training changes them. So every method
    changes them in one update of a dict, and :meth:`collect` reads copies.

    Args:
        port: 0 serves nothing.
        run: the label ``run`` of every metric: the URL of the run directory without its secrets.
        info: further labels of ``cnsdiff_run_info``.

    Raises:
        UserError: on entering, when the port cannot be had.
    """

    def __init__(self, port: int = 0, run: str = "", **info: str) -> None:
        self._port, self._run, self._info = port, run, info
        self._values: dict[str, float] = dict.fromkeys(_COUNTERS, 0.0)
        self._evaluations: dict[tuple[str, str], float] = {}

    def __enter__(self) -> Self:
        if self._port:
            registry = CollectorRegistry()
            registry.register(self)
            ProcessCollector(registry=registry)
            try:
                self._server, self._thread = start_http_server(self._port, registry=registry)
            except OSError as error:
                why = error.strerror or str(error)
                raise UserError(
                    f"run.metrics_port={self._port}: cannot listen there ({why.lower()}); "
                    "choose a free port, or 0 for none"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._port:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that have values. The server's threads call this."""
        info = InfoMetricFamily("cnsdiff_run", "What is trained here")
        info.add_metric([], {"run": self._run, **self._info})
        yield info
        values = self._values.copy()
        for names, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name in (name for name in names if name in values):
                metric = family(f"cnsdiff_{name}", names[name], labels=["run"])
                metric.add_metric([self._run], values[name])
                yield metric
        evaluation = GaugeMetricFamily(
            "cnsdiff_evaluation",
            "The last evaluation, at the best alpha",
            labels=["run", "split", "metric"],
        )
        for (split, name), value in self._evaluations.copy().items():
            evaluation.add_metric([self._run, split, name], value)
        yield evaluation

    # --- called by the reporter ---------------------------------------------------------------

    def at(self, step: int, total: int) -> None:
        """Set the steps that are done and those of the whole training."""
        self._values |= {"step": step, "planned_steps": total}

    def advance(self) -> None:
        """Count a step."""
        values = self._values
        values |= {"steps": values["steps"] + 1, "step": values["step"] + 1}

    def log(self, epoch: int, values: dict[str, float]) -> None:
        """Take the ``values`` of a line of metrics.jsonl, measured since the line before."""
        found = {name: values[name] for name in _AS_LOGGED if name in values}
        found |= {"epoch": epoch, "last_log_timestamp_seconds": time.time()}
        found["goodput_ratio"] = values["goodput"]
        found["peak_memory_bytes"] = values["memory_gib"] * 2**30
        for name in ("data_wait_seconds", "checkpoint_wait_seconds"):
            found[name] = self._values[name] + values.get(name, 0.0)
        self._values |= found

    def committed(self, commit: Commit) -> None:
        """Take the newest checkpoint. It may be the same as before, which costs nothing."""
        if commit.step == self._values.get("last_checkpoint_step"):
            return
        record = commit.checked
        found: dict[str, Any] = {
            "last_checkpoint_step": commit.step,
            "last_checkpoint_size_bytes": record.bytes,
            "last_checkpoint_timestamp_seconds": record.time,
            "last_checkpoint_write_seconds": record.write_seconds,
        }
        self._values |= {name: value for name, value in found.items() if value is not None}

    def evaluation(self, split: str, metrics: dict[str, float]) -> None:
        """Take the metrics of the last evaluation on a split."""
        self._evaluations |= {(split, name): value for name, value in metrics.items()}
