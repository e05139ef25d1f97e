"""The processes that train together. The only module that acts on the launcher's environment.

(errors.py reads the rank too, to name it in an error, without waiting for torch; roll_call.py
what the launcher's store is.)
"""

import ctypes
import os
import resource
import signal
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cnsdiff_dist.distributed.rendezvous import store_of_this_start
from cnsdiff_dist.errors import TryAgain, UserError

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LOST_PEER = (
    "closed by peer", "Connection reset", "Connection refused", "Broken pipe", "imed out",
    "timeout", "remote process exited", "NCCL", "Socket", "Read error", "Write error",
)  # fmt: skip
_LIBC = ctypes.CDLL(None) if hasattr(ctypes.CDLL(None), "mallopt") else None  # musl has none


@dataclass(frozen=True)
class World:
    """One process's place: ``rank`` in 0..size-1, its ``device``, and ``local_rank`` in
    0..local_size-1 among those of its node; ``group`` carries its collectives (None: torch's
    default one)."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def own(self, rows: int) -> range:
        """This rank's share of ``rows`` rows that all ranks hold together, as row-wise sharding
        cuts them: ceil(rows / size) each, the last ranks fewer or none."""
        return self.share(rows, self.rank)

    def share(self, rows: int, rank: int) -> range:
        each = -(-rows // self.size)
        return range(min(rank * each, rows), min((rank + 1) * each, rows))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor of this one shape, [size, ...]."""
        if self.size == 1:
            return tensor[None]
        out = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather(list(out.unbind(0)), tensor.contiguous(), group=self.group)
        return out

    def spread(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Fill the tensor with that of the rank ``source``."""
        if self.size > 1:
            dist.broadcast(tensor, source, group=self.group)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank: what one process decides, all must do."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def apart(self) -> "World":
        """The same ranks, whose collectives do not meet those of this world: for one thread of
        each rank beside the training. Collective.

        Over gloo, on hosts. They wait for hours, not for ``run.timeout_seconds``: a rank may take
        much longer to write than another; one that dies is noticed at once all the same.
        """
        if self.size == 1:  # has no collectives; each group of gloo would be a thread that polls
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=3))
        return replace(self, group=group)

    def peak_memory(self) -> float:
        """The most memory that any rank ever held, in GiB: of its GPU or, on a CPU, of the
        process, mapped files included. Collective."""
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
        else:
            held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks = self.gather(torch.tensor([held / 2**30], device=self.device))
        return float(peaks.max())

    def release_freed_blocks(self) -> None:
        """Hand back what steps left for the next ones, before other work that fills the memory."""
        if self.device.type == "cpu" and _LIBC is not None:
            _LIBC.malloc_trim(0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)


class Vote:
    """Whether any rank wants to stop, known to all at the same step, at no cost to the step.

    The answer to a step's question is collected at the next one: a sum of one number over gloo
    that travels while the step computes.
    """

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._work: dist.Work | None = None
        self._sum = torch.zeros(1)

    def any(self, mine: bool) -> bool:
        """Whether a rank said True at the call before; with one rank, at this one. Collective."""
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
    """Whether a collective failed because another rank or the network did. Gloo and NCCL say so
    only in words."""
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST_PEER)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; the host does not wait for the copy to a GPU."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def join_world(timeout_seconds: int) -> World:
    """Join the process group of the launcher (torchrun), or be a world of one.

    Raises:
        UserError: the launcher's environment is incomplete.
        TryAgain: the peers do not come.
    """
    _end_with_torchrun()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    device = _pick_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        try:
            if store := store_of_this_start(timeout):
                rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=size, timeout=timeout
                )
            elif "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:
                store = dist.HashStore()
                dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        except (RuntimeError, OSError) as error:
            raise TryAgain(f"cannot join the other ranks: {str(error).splitlines()[0]}") from None
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot join the other ranks: {reason}; launch with torchrun"
            ) from None
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), dist.get_world_size(), device, local_size, local_rank)


def _end_with_torchrun() -> None:
    """An agent that is killed cannot end its ranks, and they would train on without it."""
    if "TORCHELASTIC_RUN_ID" in os.environ and _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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
    """Have glibc keep freed blocks of up to 32 MiB, the temporaries of a step, 512 MiB of them.

    By default it hands them back to the kernel, and every page of the next step's is a fault.
    """
    if _LIBC is not None:
        for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 512 << 20)):
            _LIBC.mallopt(option, value)
