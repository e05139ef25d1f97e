"""torchrun whose exit code says what to do.

``python -m cnsdiff_dist.distributed.launcher`` takes torchrun's options.

torchrun ends with 1 whatever its ranks ended with, and starts a rank again that will fail again.
This one ends with what the ranks say (``errors.py``): with 2, at once, when the user has to mend
something; with 75 when the same command may go on; with 1 for all else. It waits for the node that
holds the rendezvous, and answers health probes. The rest is torchrun.
"""

import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cnsdiff_dist.errors import TryAgain, UserError, complain, exit_code_of

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_STUCK_SECONDS = 60.0
_ELSEWHERE = "192.0.2.1"  # an address of documentation (RFC 5737): any other network


class _Failed(UserError):
    """Neither the user's to mend nor worth another try as it is."""

    exit_code = 1


def main(words: list[str] | None = None) -> int:
    """Run torchrun with these options and return the exit code."""
    # Until torchrun handles it; the first process of a container would even ignore it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(TryAgain.exit_code))
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # torchrun's own lines; ours say the same
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import run as torchrun

    args = torchrun.parse_args(words)
    return exit_code_of(lambda: _launch(args), rank=None)


def _launch(args: Any) -> None:
    """
    Raises:
        UserError: torchrun refuses an option, or as :func:`_run`.
    """
    from torch.distributed import run as torchrun

    try:
        config, _, _ = torchrun.config_from_args(args)
    except ValueError as error:
        raise UserError(f"torchrun: {error}") from None
    _watch_the_agent(_Health.on(os.environ.get("CNSDIFF_HEALTH_PORT", "")))
    _set_threads(config.nproc_per_node)
    if args.rdzv_endpoint:
        host, is_first = _first_node(args.rdzv_endpoint, config.rdzv_configs)
        args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, f"is_host={is_first}"]))
        _set_interfaces(host)
    _run(args)


def _run(args: Any) -> None:
    """
    Raises:
        UserError: a rank, another node or a signal ended the training; its exit code is ours.
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
    """What the exit codes of this node's ranks mean together; negative ones are signals."""
    line, found = _ended(codes), set(codes.values())
    if UserError.exit_code in found:
        return UserError(f"{line}; its own line above says what to mend")
    if found <= {TryAgain.exit_code, -signal.SIGTERM}:
        return TryAgain(f"{line}; run again to go on")
    return _Failed(f"{line}, and no restart is left")


def _ended(codes: dict[int, int]) -> str:
    # torchrun stops the ranks beside one that failed; that says nothing of them.
    codes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    return ", ".join(f"rank {rank} ended with {_name(code)}" for rank, code in codes.items())


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else str(code)


def _watch_the_agent(health: "_Health") -> None:
    """Have torchrun use an agent that tells ``health`` of its doings and gives up when a rank's
    exit code says that another start will not help."""
    from torch.distributed.elastic.agent.server import api, local_elastic_agent
    from torch.distributed.elastic.rendezvous import RendezvousClosedError
    from torch.distributed.launcher import api as launcher

    class Agent(local_elastic_agent.LocalElasticAgent):
        def _rendezvous(self, worker_group: api.WorkerGroup) -> None:
            health.beat(None)
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
            # Its ranks may have ended before they met ours, which would wait for them.
            if running and worker_group.spec.rdzv_handler.is_closed():
                raise RendezvousClosedError
            health.beat(time.monotonic() if running else None)
            return result

    launcher.LocalElasticAgent = Agent  # type: ignore[misc]


class _Health:
    """Answers probes: /healthz unless the agent is stuck, /ready while this node's ranks run.

    Waiting for other nodes and ending are bounded by their own timeouts; whether ranks make
    progress they watch themselves (``peers.py``).
    """

    def __init__(self) -> None:
        self._last: float | None = None

    @classmethod
    def on(cls, port: str) -> "_Health":
        """
        Raises:
            UserError: the port is not one, or is taken.
        """
        health = cls()
        if port:
            try:
                server = ThreadingHTTPServer(("", int(port)), health._handler())
            except (OSError, ValueError, OverflowError) as error:
                raise UserError(f"CNSDIFF_HEALTH_PORT={port}: {error}") from None
            threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
        return health

    def beat(self, now: float | None) -> None:
        """The agent's loop went round at this monotonic time; None: it does not watch ranks."""
        self._last = now

    def answers(self, path: str) -> bool | None:
        """None for a path that there is not."""
        last = self._last
        alive = last is None or time.monotonic() - last < _STUCK_SECONDS
        return {"/healthz": alive, "/ready": alive and last is not None}.get(path)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = health.answers(self.path)
                self.send_response(404 if answer is None else 200 if answer else 503)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Probes come every few seconds."""

        return Handler


def _first_node(endpoint: str, options: dict[str, Any]) -> tuple[str, bool]:
    """The node that holds the rendezvous, and whether it is this one. The others wait until it
    listens: it may be late (its container may prepare data first), and unknown by name until then.

    Raises:
        TryAgain: it does not come within the rendezvous' join_timeout.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    host, port = parse_rendezvous_endpoint(endpoint, default_port=29400)
    is_first = options["is_host"] == "true" if "is_host" in options else _is_ours(host)
    deadline = time.monotonic() + int(options.get("join_timeout", 600))
    while not is_first:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise TryAgain(f"the first node does not listen at {endpoint}; run again") from None
            time.sleep(1)
    return host, is_first


def _is_ours(host: str) -> bool:
    """Whether it stands for an address of this machine; torchrun asks by name, which on many
    machines means the loopback."""
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _set_threads(ranks: int) -> None:
    """Each rank gets its share of this container's cores, where nothing else is asked for."""
    threads = max(1, _cores() // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _cores(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, and the quota of its cgroup (v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores


def _set_interfaces(first: str) -> None:
    """Gloo and NCCL use the interface that leads to the first node, where no other is asked for:
    by themselves they take what the host's own name stands for, often the loopback."""
    name = _interface_towards(first)
    if name == "lo":  # many a host's own name means that; then the way out
        name = _interface_towards(_ELSEWHERE)
    if name and name != "lo":
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", name)


def _interface_towards(host: str) -> str | None:
    """The interface with the address that packets to ``host`` leave from (IPv4)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        mine = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has no address
                if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24] == mine:
                    return name
    return None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
