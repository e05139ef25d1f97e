"""Two network namespaces joined by a veth pair: nodes that can lose each other."""

import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.chaos.job import COMING_AND_GOING, Node

_PORT = 29_411


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, timeout=20)


class TwoNodes:
    """The first node holds the rendezvous, so it is the one that has to be there."""

    def __init__(self) -> None:
        number = os.getpid() % 10_000
        self._names = [f"chaos{number}{letter}" for letter in "ab"]
        self._links = [f"ch{number}{letter}" for letter in "ab"]
        self._addresses = [f"10.77.{number % 200}.{host}" for host in (1, 2)]

    def up(self) -> list[Node]:
        for name, address in zip(self._names, self._addresses, strict=True):
            _ip("netns", "add", name)
            # Ranks look up their host's own name; here it must be this node's address.
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        first, second = self._links
        _ip("link", "add", first, "type", "veth", "peer", "name", second)
        for name, link, address in zip(self._names, self._links, self._addresses, strict=True):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return [self._node(index) for index in (0, 1)]

    def _node(self, index: int) -> Node:
        # A node that is silent for 3 s is left behind; the rest wait 2 s for others to join.
        rendezvous = (
            f"is_host={index == 0},join_timeout=300,last_call_timeout=2,"
            "keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=20"
        )
        words = [
            "--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-id", "chaos",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self._addresses[0]}:{_PORT}",
            "--rdzv-conf", rendezvous, "--local-addr", self._addresses[index],
        ]  # fmt: skip
        prefix = ["ip", "netns", "exec", self._names[index]]
        environment = {"GLOO_SOCKET_IFNAME": self._links[index], **COMING_AND_GOING}
        return Node(words, prefix, environment)

    def cut(self) -> None:
        _ip("-n", self._names[1], "link", "set", self._links[1], "down")

    def mend(self) -> None:
        _ip("-n", self._names[1], "link", "set", self._links[1], "up")

    def down(self) -> None:
        for name in self._names:
            _ip("netns", "del", name, check=False)
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.unlink(missing_ok=True)
            with suppress(OSError):
                hosts.parent.rmdir()
