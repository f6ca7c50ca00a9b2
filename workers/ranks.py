"""The ranks of a worker that is spread over several devices, and the collectives that its model needs.

A rank has a process of its own and holds a part of the base and of each adapter. All ranks run the same steps in the
same order, so every collective is called by all of them. `Ranks` itself is one rank alone, and calls nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

# Later releases of torch have it under another name.
_all_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

TIMEOUT_S = 600.0
"""A collective that other ranks do not join fails after this time: ranks start at different speeds."""
DIRECT_BYTES = 16 << 20
"""Longest message that GPUs sum by reading each other's memory; NCCL sums longer ones."""
ONE_SHOT_BYTES = 128 << 10
"""Most bytes of others that each GPU reads and sums by itself. Of longer messages each sums a part, and all read it."""
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""NVLink multicast needs a fabric manager that may not be there, and messages of a step are too small for it."""
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""Ranks are of one machine. Their ports ask for no secret, so no other machine is to reach them."""


class Ranks:
    """One rank alone: each collective returns what it is given."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """True for the rank that samples."""
        return self.rank == 0

    def partial(self, num_rows: int, width: int, like: Tensor) -> Tensor:
        """(num_rows, width) unwritten, in `like`'s dtype: memory whose `all_reduce` costs least.

        It is valid until the next `partial`.
        """
        return like.new_empty((num_rows, width))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same bits on each. Contiguous; it may be written in the argument's place.

        It is never memory of `partial`.
        """
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor:
        """(rows, width) -> (rows, size * width): the columns of all ranks side by side, on each of them."""
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite the tensor, contiguous, with rank 0's."""

    def close(self) -> None:
        """Leave the group. No collective may be running."""


class ConnectedRanks(Ranks):
    """One of several ranks, connected by torch.distributed: gloo on CPUs, NCCL on GPUs.

    On CUDA a collective is launched on the current stream and may be captured in a graph.
    """

    def __init__(self, rank: int, size: int, device: torch.device, group: dist.ProcessGroup) -> None:
        """Joined by `connect`."""
        super().__init__(rank, size)
        self._device = device
        self._group = group
        self._direct = _DirectSums.try_make(group, device) if device.type == "cuda" else None

    def partial(self, num_rows: int, width: int, like: Tensor) -> Tensor:
        tensor = None if self._direct is None else self._direct.take(num_rows, width, like.dtype)
        return super().partial(num_rows, width, like) if tensor is None else tensor

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self._direct is not None:
            total = self._direct.try_sum(tensor)
            if total is not None:
                return total
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor:
        num_rows, width = tensor.shape
        if num_rows == 0:  # a step that wants no logits
            return tensor.new_empty((0, self.size * width))
        parts = tensor.new_empty((self.size * num_rows, width))
        _all_gather(parts, tensor.contiguous(), group=self._group)
        return parts.view(self.size, num_rows, width).transpose(0, 1).reshape(num_rows, self.size * width)

    def broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self._group)

    def close(self) -> None:
        self._direct = None
        # NCCL would wait for the end of all graphs that have captured its work. The end of the process frees it.
        if self._device.type != "cuda":
            dist.destroy_process_group()
            del self._group  # its sockets are open as long as anything has it


class _DirectSums:
    """Sums of messages that lie in memory which all ranks' GPUs may read: one launch, no copy.

    Torch's one-shot and two-shot all-reduce. They wait for the other ranks before they read, and again before they end,
    so the memory may be written anew behind them.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self._group_name = group.group_name
        self._size = dist.get_world_size(group)
        self._memory: Tensor = symmetric.empty(DIRECT_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._memory, self._group_name)
        ops = torch.ops.symm_mem
        self._try(lambda ones: ops.one_shot_all_reduce(ones, "sum", self._group_name))
        self._two_shot: Callable[[Tensor], Tensor] = lambda tensor: ops.two_shot_all_reduce_out(
            tensor, "sum", self._group_name, torch.empty_like(tensor)
        )
        try:
            self._try(self._two_shot)
        except (RuntimeError, AttributeError):
            # A release of torch that lacks it has the same with one copy more.
            self._two_shot = lambda tensor: ops.two_shot_all_reduce_(tensor, "sum", self._group_name).clone()
            self._try(self._two_shot)

    def _try(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Raise ArithmeticError if the sum of the ranks' ones is wrong."""
        ones = self._memory[: 2 * ONE_SHOT_BYTES].view(torch.float32).fill_(1.0)
        if not bool((add_up(ones) == self._size).all()):
            raise ArithmeticError("a sum of ones is wrong")

    @classmethod
    def try_make(cls, group: dist.ProcessGroup, device: torch.device) -> _DirectSums | None:
        """None, on all ranks alike, where one of them cannot do it."""
        made: _DirectSums | None = None
        try:
            made = cls(group, device)
        except (RuntimeError, ImportError, AttributeError, ArithmeticError) as error:
            logger.warning("NCCL sums all messages, since GPUs cannot read each other's memory: %s", error)
        can_all = torch.tensor([made is not None], dtype=torch.int32, device=device)
        dist.all_reduce(can_all, op=dist.ReduceOp.MIN, group=group)
        return made if bool(can_all.item()) else None

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """(num_rows, width) of the memory; None where it is too small, or the message is of no whole 16 bytes."""
        num_bytes = num_rows * width * dtype.itemsize
        if not 0 < num_bytes <= len(self._memory) or num_bytes % 16 or dtype not in (torch.bfloat16, torch.float32):
            return None
        return self._memory[:num_bytes].view(dtype).view(num_rows, width)

    def try_sum(self, tensor: Tensor) -> Tensor | None:
        """The sum in new memory, if the tensor is one of `take`."""
        if tensor.data_ptr() != self._memory.data_ptr():
            return None
        if tensor.nbytes * (self._size - 1) > ONE_SHOT_BYTES:
            return self._two_shot(tensor)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(tensor, "sum", self._group_name)
        return total


def connect(
    rank: int, size: int, *, device: torch.device, store: Store, timeout_s: float = TIMEOUT_S
) -> ConnectedRanks:
    """Join the group as `rank` of `size`, and wait for the others. A process is in one group at most.

    store: torch's, by which ranks find each other (`FileStore`, `TCPStore`). Raises RuntimeError when not all come
    within `timeout_s`; later collectives fail after as long.
    """
    for name, value in (NO_MULTICAST | ON_LOOPBACK).items():
        os.environ.setdefault(name, value)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if is_cuda else None,
    )
    group = dist.group.WORLD
    assert group is not None
    return ConnectedRanks(rank, size, device, group)
