"""Ports of this machine that nothing listens on.

They lie below those that the kernel gives to outgoing connections, and are drawn at random: test
workers run side by side and look at the same time.
"""

import random
import socket
from contextlib import closing

_FIRST, _LAST, _APART = 10_240, 22_000, 10_000


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Ports that are free together with port + 10000, which the S3 server opens as well.

    Raises:
        OSError: the machine has too few.
    """
    ports = random.SystemRandom().sample(range(_FIRST, _LAST), _LAST - _FIRST)
    free = (port for port in ports if _is_free(port) and _is_free(port + _APART))
    found = [port for _, port in zip(range(count), free)]
    if len(found) < count:
        raise OSError(f"fewer than {count} free ports")
    return found


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
