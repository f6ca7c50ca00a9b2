"""Recurrent states of all sequences of one worker: a slot each, beside the pages of keys and values.

Layers that do not attend keep a state of fixed size for each sequence: what a recurrence has summed up, and the last
inputs of a convolution. One engine thread hands out the slots; steps read and write them in their order on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lorafleet.workers.memory.pages import PageAllocator

NULL_SLOT = 0
"""Takes what padding rows leave, and is no sequence's."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """The tensor that one operation of a layer keeps of each sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one sequence's."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateSlotCounts:
    """Slots that sequences hold, all slots, and the bytes of one."""

    used: int
    total: int
    slot_bytes: int


class StateStore:
    """The states of every layer; a slot means the same sequence in all of them.

    `tensors[operation]`: (num_slots + 1, *shape). A slot holds what its last owner left: a sequence's first rows start
    from zero whatever is there.
    """

    def __init__(self, shapes: Mapping[str, StateShape], *, num_slots: int, device: torch.device) -> None:
        """shapes: by operation; none for a base without recurrent layers, which takes no memory."""
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros((num_slots + 1, *each.shape), dtype=each.dtype, device=device)
            for name, each in shapes.items()
        }
        self._slots = PageAllocator(num_slots)

    @property
    def has_states(self) -> bool:
        """True if the base has recurrent layers at all."""
        return bool(self.tensors)

    @property
    def counts(self) -> StateSlotCounts:
        """Zeros for a base without recurrent layers."""
        if not self.has_states:
            return StateSlotCounts(0, 0, 0)
        one_slot = sum(tensor[:1].nbytes for tensor in self.tensors.values())
        return StateSlotCounts(self._slots.num_used, self._slots.num_total, one_slot)

    def acquire(self) -> int:
        """A slot for a sequence. There is one for each that runs."""
        if not self.has_states:
            return NULL_SLOT
        (slot,) = self._slots.allocate(1)
        return slot + 1

    def release(self, slot: int) -> None:
        """Take a sequence's slot back; NULL_SLOT is nobody's."""
        if slot != NULL_SLOT:
            self._slots.free([slot - 1])

    @staticmethod
    def slot_bytes(shapes: Mapping[str, StateShape]) -> int:
        """Bytes that one sequence takes over all layers."""
        return sum(each.num_bytes for each in shapes.values())
