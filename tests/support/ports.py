"""Ports of this machine that nothing listens on."""

import random
import socket
from contextlib import closing


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_ports(count: int) -> list[int]:
    """Ports that are free together with port + 10000, which the server opens as well."""
    found: list[int] = []
    # From a random place on: test workers that run side by side look at the same time.
    start = random.SystemRandom().randrange(20_000)
    for port in (20_000 + (start + 7 * index) % 20_000 for index in range(2_857)):
        try:
            for number in (port, port + 10_000):
                with closing(socket.socket()) as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            break
    return found
