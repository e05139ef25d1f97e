"""Two nodes of a training that can lose each other."""

from tests.chaos.job import COMING_AND_GOING, Node
from tests.support.hosts import TwoHosts

_PORT = 29_411


class TwoNodes:
    """Two hosts, of which the first holds the rendezvous, so that the second depends on it."""

    def __init__(self) -> None:
        self._hosts = TwoHosts(["chaos-0"], ["chaos-1"])
        self.cut, self.mend, self.down = self._hosts.cut, self._hosts.mend, self._hosts.down

    def up(self) -> list[Node]:
        self._hosts.up()
        return [self._node(index) for index in (0, 1)]

    def _node(self, index: int) -> Node:
        # A node that is silent for 3 s is left behind; the rest wait 2 s for others to join.
        rendezvous = (
            f"is_host={index == 0},join_timeout=300,last_call_timeout=2,"
            "keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=20"
        )
        addresses = self._hosts.addresses
        words = "--nnodes 1:2 --nproc-per-node 1 --rdzv-id chaos --rdzv-backend c10d".split()
        words += ["--rdzv-endpoint", f"{addresses[0]}:{_PORT}", "--rdzv-conf", rendezvous]
        words += ["--local-addr", addresses[index]]
        environment = {"GLOO_SOCKET_IFNAME": self._hosts.links[index], **COMING_AND_GOING}
        return Node(words, self._hosts.inside(index), environment)
