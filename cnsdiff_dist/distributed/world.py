"""The ranks that train together, and how a process joins them.

Only this module acts on the environment that the launcher sets; ``errors.py`` and ``logs.py`` read
the rank from it too, because they must not import torch.
"""

import ctypes
import os
import re
import resource
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cnsdiff_dist.distributed.orphans import end_with_the_agent
from cnsdiff_dist.distributed.rendezvous import store_of_this_start
from cnsdiff_dist.errors import TryAgain, UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LIBC = ctypes.CDLL(None) if hasattr(ctypes.CDLL(None), "mallopt") else None  # musl has no mallopt
_LOST_PEER = re.compile(
    "closed by peer|Connection reset|Connection refused|Broken pipe|[Tt]imed out|timeout"
    "|remote process exited|NCCL|Socket|Read error|Write error"
)


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and the collectives between them.

    Args:
        rank: in 0..size-1.
        local_rank: in 0..local_size-1, among the ranks of this node.
        group: the process group of the collectives; None is torch's default group.
    """

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def own_rows(self, rows: int) -> range:
        """Return this rank's part of ``rows`` rows that the ranks hold together."""
        return self.rows_of(self.rank, rows)

    def rows_of(self, rank: int, rows: int) -> range:
        """Return a rank's part of ``rows`` rows, cut as row-wise sharding cuts a table.

        Each rank has ceil(rows / size) rows, and the last ranks fewer or none.
        """
        each = -(-rows // self.size)
        return range(min(rank * each, rows), min((rank + 1) * each, rows))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up the tensors of all ranks, in place. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, of one shape, as [size, ...]. Collective."""
        if self.size == 1:
            return tensor[None]
        out = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather(list(out.unbind(0)), tensor.contiguous(), group=self.group)
        return out

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value of every rank, by rank. Collective."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def broadcast_tensor(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite the tensor with that of the rank ``source``. Collective."""
        if self.size > 1:
            dist.broadcast(tensor, source, group=self.group)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value, so that all ranks act on the same decision. Collective."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here. Collective."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def with_side_group(self) -> "World":
        """Return the same ranks with a process group of their own. Collective.

        One thread of each rank can use it beside the training without its collectives meeting
        those of the training. It is a gloo group on host memory. Its collectives wait for hours
        instead of ``run.timeout_seconds``, because one rank may take much longer to write than
        another; a rank that dies is still noticed at once.
        """
        if self.size == 1:  # needs no collectives, and every gloo group has a thread that polls
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=3))
        return replace(self, group=group)

    def peak_memory(self) -> float:
        """Return the most memory in GiB that any rank has held so far. Collective.

        It is the memory of the rank's GPU or, on a CPU, of its process with mapped files.
        """
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
        else:
            held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks = self.gather(torch.tensor([held / 2**30], device=self.device))
        return float(peaks.max())

    def release_freed_blocks(self) -> None:
        """Return the memory that :func:`_keep_freed_blocks` keeps to the kernel.

        Call it between the training steps and other work that needs much memory.
        """
        if self.device.type == "cpu" and _LIBC is not None:
            _LIBC.malloc_trim(0)


class Vote:
    """Tells all ranks at the same step whether any of them wants to stop.

    Each step sums one number over gloo. The sum travels while the step computes and is read at the
    next step, so that no step waits for it.
    """

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._work: dist.Work | None = None
        self._sum = torch.zeros(1)

    def any(self, mine: bool) -> bool:
        """Return whether any rank passed True to the call before this one. Collective.

        A world of one rank gets the answer of this call.
        """
        if self._group is None:
            return mine
        decided = False
        if self._work is not None:
            self._work.wait()
            decided = bool(self._sum > 0)
        self._sum = torch.full((1,), float(mine))
        self._work = dist.all_reduce(self._sum, group=self._group, async_op=True)
        return decided


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective failed because another rank or the network failed.

    Gloo and NCCL say so only in the text of a RuntimeError.
    """
    return isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device; the host does not wait for a copy to a GPU."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def join_world(timeout_seconds: int) -> World:
    """Join the process group of the launcher (torchrun); without one, be a world of one rank.

    Raises:
        UserError: the launcher's environment is incomplete, or this rank has no GPU.
        TryAgain: the other ranks do not come.
    """
    end_with_the_agent()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed requires the variable
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = _pick_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            _init_process_group(backend, timedelta(seconds=timeout_seconds))
        except (RuntimeError, OSError) as error:
            raise TryAgain(f"cannot join the other ranks: {_first_line(error)}") from None
        except ValueError as error:
            reason = f"{_first_line(error)}; launch with torchrun"
            raise UserError(f"cannot join the other ranks: {reason}") from None
    return World(dist.get_rank(), dist.get_world_size(), device, local_size, local_rank)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_process_group(backend: str, timeout: timedelta) -> None:
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # all of torchrun's restarts share it
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        shared = dist.TCPStore(address, port, is_master=False, timeout=timeout)
        store = store_of_this_start(shared, rank, size, timeout)
    elif "RANK" in env:
        dist.init_process_group(backend, timeout=timeout)
        return
    else:
        rank, size, store = 0, 1, dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_blocks()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _keep_freed_blocks() -> None:
    """Have glibc keep up to 512 MiB of freed blocks of at most 32 MiB each.

    Those are the temporaries of a step. By default glibc returns them to the kernel, and the next
    step has a page fault for every page of its temporaries.
    """
    if _LIBC is not None:
        _LIBC.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 512 << 20)
