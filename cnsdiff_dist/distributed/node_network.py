"""This node's place in the network: the first node, and the interface that leads to it."""

import fcntl
import os
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from cnsdiff_dist.errors import TryAgain

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_OTHER_NETWORK = "192.0.2.1"  # reserved for documentation (RFC 5737), so on no local network


def find_first_node(endpoint: str, options: dict[str, Any]) -> tuple[str, bool]:
    """Return the host that holds the rendezvous, and whether it is this node.

    Every other node waits until that host listens. The host may be late, because its container may
    first prepare data, and its name may be unknown until then.

    Args:
        endpoint: HOST or HOST:PORT.
        options: torchrun's ``rdzv_conf``.

    Raises:
        TryAgain: the host does not listen within the rendezvous' ``join_timeout``.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    host, port = parse_rendezvous_endpoint(endpoint, default_port=29400)
    is_first = options["is_host"] == "true" if "is_host" in options else _is_own_address(host)
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


def choose_interface(first_node: str) -> None:
    """Have Gloo and NCCL use the interface that leads to the first node, unless one is set.

    By themselves they take the interface of the host's own name, which is often the loopback.
    """
    name = _interface_towards(first_node)
    if name == "lo":  # the first node's own name often means its loopback
        name = _interface_towards(_OTHER_NETWORK)
    if name and name != "lo":
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", name)


def _is_own_address(host: str) -> bool:
    """Return whether a name or address is one of this machine's.

    torchrun compares names instead, and a machine's own name often means the loopback.
    """
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _interface_towards(host: str) -> str | None:
    """Return the interface whose IPv4 address packets to the host are sent from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # the interface has no address
                if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24] == address:
                    return name
    return None
