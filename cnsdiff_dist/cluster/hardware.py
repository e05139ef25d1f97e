"""The machines that a plan is made for: bandwidths, memory and arithmetic of a rank's share.

The figures of GPUs are their makers'; those of CPUs were measured where docs/benchmarks.md was.
"""

import os
from dataclasses import dataclass, replace

GB = 10**9


@dataclass(frozen=True)
class Link:
    """Bytes a second of a rank, one way, and bytes that it has room for."""

    memory: float
    host: float
    within_node: float
    between_nodes: float
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Device:
    """A rank's share of its node.

    Attributes:
        link: bandwidths in bytes a second, one way, and memory in bytes.
        operations: multiplications and additions a second in float32 (TF32 on a GPU).
        kernels_seconds: a step's kernel launches and Python, guessed.
    """

    link: Link
    operations: float
    kernels_seconds: float


# Of a GPU: its HBM, PCIe, NVLink, network, memory, and 1/8 of 2 TB of host memory.
_H100 = Link(3.35e12, 64e9, 450e9, 50e9, 80 * GB, 250 * GB)
_H200 = Link(4.8e12, 64e9, 450e9, 50e9, 141 * GB, 250 * GB)
_A100 = Link(2.04e12, 32e9, 300e9, 25e9, 80 * GB, 125 * GB)
# Of a core: copies, and gloo over the loopback. The network between nodes is a guess.
_CORE = Link(13e9, 13e9, 1.4e9, 1e9, 0, 0)
DEVICES = {
    "h100": Device(_H100, 495e12, 2e-3),
    "h200": Device(_H200, 495e12, 2e-3),
    "a100": Device(_A100, 156e12, 2e-3),
    "cpu": Device(_CORE, 160e9, 5e-3),
}


@dataclass(frozen=True)
class Cluster:
    """``per_node`` ranks on each of ``nodes`` nodes; ``device`` is one of ``DEVICES``."""

    device: str
    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def spec(self) -> Device:
        """On CPUs the memory is this machine's, shared among the ranks of a node."""
        spec = DEVICES[self.device]
        if self.cuda:
            return spec
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return replace(spec, link=replace(spec.link, host_bytes=whole // self.per_node))
