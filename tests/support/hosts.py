"""Two hosts on this machine: network namespaces with names of their own, joined by a veth pair.

They can reach each other and nothing else. Needs root and iproute2.
"""

import os
import subprocess
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, timeout=20)


class TwoHosts:
    """Two hosts that reach each other by name.

    Args:
        names: the names of each host; the first is its own host name.
    """

    def __init__(self, *names: Sequence[str]) -> None:
        mark = uuid.uuid4().hex[:6]
        self.names = names
        self._spaces = [f"cnsdiff-{mark}-{index}" for index in (0, 1)]
        self.links = [f"cd{mark}{index}" for index in (0, 1)]
        self.addresses = [f"10.77.{os.getpid() % 200}.{host}" for host in (1, 2)]

    def up(self) -> None:
        lines = [
            f"{address} {' '.join(names)}\n"
            for address, names in zip(self.addresses, self.names, strict=True)
        ]
        for space in self._spaces:
            _ip("netns", "add", space)
            hosts = Path("/etc/netns") / space / "hosts"  # ip mounts it over /etc/hosts
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        first, second = self.links
        _ip("link", "add", first, "type", "veth", "peer", "name", second)
        for space, link, address in zip(self._spaces, self.links, self.addresses, strict=True):
            _ip("link", "set", link, "netns", space)
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", space, "link", "set", link, "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def inside(self, index: int) -> list[str]:
        """The words that run the command after them on that host."""
        script = 'hostname "$0" && exec "$@"'
        own_name = ["unshare", "--uts", "sh", "-c", script, self.names[index][0]]
        return ["ip", "netns", "exec", self._spaces[index], *own_name]

    def cut(self) -> None:
        _ip("-n", self._spaces[1], "link", "set", self.links[1], "down")

    def mend(self) -> None:
        _ip("-n", self._spaces[1], "link", "set", self.links[1], "up")

    def down(self) -> None:
        for space in self._spaces:
            _ip("netns", "del", space, check=False)
            hosts = Path("/etc/netns") / space / "hosts"
            hosts.unlink(missing_ok=True)
            with suppress(OSError):
                hosts.parent.rmdir()


def why_not() -> str | None:
    """Why this machine cannot make such hosts, or None."""
    name = f"cnsdiff-probe-{os.getpid()}"
    probe = f"ip netns add {name} && ip netns del {name} && unshare --uts true"
    done = subprocess.run(probe, shell=True, capture_output=True, text=True, check=False)
    return f"needs `{probe}` ({done.stderr.strip()})" if done.returncode else None
