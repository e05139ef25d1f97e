"""torchrun with exit codes that say what to do next.

``python -m cnsdiff_dist.distributed.launcher`` takes torchrun's options.

torchrun exits with 1 whatever its ranks exited with, and restarts a rank that will fail again. This
launcher exits with what the ranks say (``errors.py``): with 2, at once, if the user has to mend
something; with 75 if the same command may go on; with 1 for everything else. It also waits for the
node that holds the rendezvous, and answers health probes. All else is torchrun's.

torch is imported inside functions: its import takes seconds, and :func:`main` first sets what must
hold during them.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cnsdiff_dist.distributed.health import Health
from cnsdiff_dist.distributed.node_network import choose_interface, find_first_node
from cnsdiff_dist.errors import TryAgain, UserError, complain, exit_code_of


class _NoRestartLeft(UserError):
    """A failure that is neither the user's to mend nor worth another try."""

    exit_code = 1


def main(words: list[str] | None = None) -> int:
    """Run torchrun with these options and return the exit code."""
    # Until torchrun handles SIGTERM; the first process of a container would even ignore it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(TryAgain.exit_code))
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # torchrun's lines would repeat ours
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import run as torchrun

    args = torchrun.parse_args(words)
    return exit_code_of(lambda: _launch(args), rank=None)


def _launch(args: Any) -> None:
    """Prepare this node and run torchrun with its parsed options.

    Raises:
        UserError: torchrun refuses an option, the health port is taken, the first node does not
            come, or as :func:`_run`.
    """
    from torch.distributed import run as torchrun

    try:
        config, _, _ = torchrun.config_from_args(args)
    except ValueError as error:
        raise UserError(f"torchrun: {error}") from None
    _use_own_agent(Health.listening_on(os.environ.get("CNSDIFF_HEALTH_PORT", "")))
    _set_threads(config.nproc_per_node)
    if args.rdzv_endpoint:
        first_node, is_first = find_first_node(args.rdzv_endpoint, config.rdzv_configs)
        args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, f"is_host={is_first}"]))
        choose_interface(first_node)
    _run(args)


def _use_own_agent(health: Health) -> None:
    """Have torchrun use an agent that reports to ``health`` and does not restart in vain."""
    from torch.distributed.elastic.agent.server import api, local_elastic_agent
    from torch.distributed.elastic.rendezvous import RendezvousClosedError
    from torch.distributed.launcher import api as launcher

    class Agent(local_elastic_agent.LocalElasticAgent):
        def _rendezvous(self, worker_group: api.WorkerGroup) -> None:
            health.set_last_round(None)
            super()._rendezvous(worker_group)

        def _monitor_workers(self, worker_group: api.WorkerGroup) -> api.RunResult:
            result = super()._monitor_workers(worker_group)
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            if UserError.exit_code in codes.values():
                self._remaining_restarts = 0
            if codes and self._remaining_restarts:
                left = self._remaining_restarts - 1
                complain(f"{_ended(codes)}: started again ({left} restarts are left)", rank=None)
            running = result.state == api.WorkerState.HEALTHY
            # The other node's ranks may have ended before they met ours, which would wait for them.
            if running and worker_group.spec.rdzv_handler.is_closed():
                raise RendezvousClosedError
            health.set_last_round(time.monotonic() if running else None)
            return result

    launcher.LocalElasticAgent = Agent  # type: ignore[misc]


def _set_threads(ranks: int) -> None:
    """Give each rank its part of this container's cores, unless OMP_NUM_THREADS is set."""
    threads = max(1, _cores() // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores this process may use: its affinity, and its cgroup's quota (v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores


def _run(args: Any) -> None:
    """Run torchrun and turn its errors into ours.

    Raises:
        UserError: a rank, another node or a signal ended the training; the error has the exit code.
    """
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    try:
        torchrun.run(args)
    except ChildFailedError as error:
        raise _failure({rank: f.exitcode for rank, f in error.failures.items()}) from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise TryAgain(f"{_name(-error.sigval)}: run again to go on") from None
    except RendezvousClosedError:
        raise TryAgain("another node has ended this training; its log says why") from None
    except (RendezvousError, DistError) as error:
        why = type(error).__name__
        raise TryAgain(f"the nodes do not find each other ({why}); run again") from None


def _failure(codes: dict[int, int]) -> UserError:
    """Return the error that the exit codes of this node's ranks amount to.

    A negative code is the signal that ended the rank.
    """
    line, found = _ended(codes), set(codes.values())
    if UserError.exit_code in found:
        return UserError(f"{line}; its own line above says what to mend")
    if found <= {TryAgain.exit_code, -signal.SIGTERM}:
        return TryAgain(f"{line}; run again to go on")
    return _NoRestartLeft(f"{line}, and no restart is left")


def _ended(codes: dict[int, int]) -> str:
    # When a rank fails, torchrun stops the others with SIGTERM; they are not to blame.
    codes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    return ", ".join(f"rank {rank} ended with {_name(code)}" for rank, code in codes.items())


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else str(code)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
