"""Follows the first rank, step by step: computes and changes what it is told, and decides nothing."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.workers.errors import NoRoomError
from lorafleet.workers.group.control import Weights
from lorafleet.workers.group.entries import Allocated, Change, Freed, Published
from lorafleet.workers.group.followed import FollowingCache, FollowingPool
from lorafleet.workers.group.staging import read_staged
from lorafleet.workers.memory.adapter_pool import Allocation, UploadedAdapter
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.step.message import StepMessage


@dataclass(slots=True)
class _Taken:
    """A slot that the first rank gave to an adapter."""

    manifest: AdapterManifest
    number: int
    allocation: Allocation | None
    """None: this rank has no pages for it."""
    uploaded: UploadedAdapter | None = None


class Follower:
    """Applies entries to a runner and its memories. `upload` may run in another thread, one at a time."""

    def __init__(self, runner: ModelRunner, cache: FollowingCache, pool: FollowingPool) -> None:
        self._runner = runner
        self._cache = cache
        self._pool = pool
        self._num_sampled = 0
        """Rows that the last step sampled, of which the next may want the tokens."""
        self._taken: dict[int, _Taken] = {}
        """By slot."""
        self._by_number: dict[int, _Taken] = {}
        """By the allocation's number."""
        self._has_news = threading.Condition()

    def apply(self, entry: StepMessage | Change) -> None:
        """Do what the entry says, behind all entries before it."""
        if isinstance(entry, StepMessage):
            self._compute(entry)
        elif isinstance(entry, Allocated):
            self._take(entry)
        elif isinstance(entry, Published):
            taken = self._taken[entry.slot]
            assert taken.uploaded is not None, f"slot {entry.slot} is published, but its weights never came"
            self._pool.publish(taken.uploaded)
        elif isinstance(entry, Freed):
            self._free(entry.slot)
        else:
            self._cache.zero(entry.pages)

    def upload(self, weights: Weights, descriptor: int) -> None:
        """Write this rank's part of an adapter. Waits for its allocation. Raises NoRoomError."""
        with self._has_news:
            self._has_news.wait_for(lambda: weights.number in self._by_number)
            taken = self._by_number[weights.number]
        with read_staged(descriptor, weights, taken.manifest) as whole:
            if taken.allocation is None:
                raise self._no_room(taken.manifest)
            taken.uploaded = self._pool.upload(taken.allocation, whole)

    @torch.inference_mode()
    def _compute(self, message: StepMessage) -> None:
        """Begin a step's forward pass, whose logits the first rank has too."""
        runner, header = self._runner, message.header
        device, packed = runner.base.device, torch.from_numpy(message.packed)
        # The message's memory is the ring's, and a copy that nobody waits for is from pinned memory.
        packed = packed.pin_memory() if device.type == "cuda" else packed.clone()
        graph = None if header.form is None else runner.graphs[header.graph_key]
        if graph is not None:
            graph.packed.copy_(packed, non_blocking=True)
        inputs = message.view(packed.to(device, non_blocking=True)) if graph is None else graph.inputs
        if header.has_pending:
            self._fill_pending(inputs.token_ids)
        self._num_sampled = header.num_sampled_rows
        if graph is not None:
            graph.replay()
            return
        with runner.step(inputs):
            for each in inputs.passes:
                runner.logits_of(inputs, each)

    def _fill_pending(self, token_ids: torch.Tensor) -> None:
        """Put the tokens that the first rank chose in the last step in the places of their placeholders."""
        chosen = torch.empty(self._num_sampled, dtype=torch.int64, device=token_ids.device)
        self._runner.ranks.broadcast(chosen)
        chosen = chosen[(-1 - token_ids).clamp_(min=0)]
        torch.where(token_ids < 0, chosen.to(token_ids.dtype), token_ids, out=token_ids)

    def _take(self, entry: Allocated) -> None:
        allocation = self._pool.take(entry.manifest)
        assert allocation is None or allocation.slot == entry.slot, (allocation, entry.slot)
        taken = self._taken[entry.slot] = _Taken(entry.manifest, entry.number, allocation)
        with self._has_news:
            self._by_number[entry.number] = taken
            self._has_news.notify_all()

    def _free(self, slot: int) -> None:
        taken = self._taken.pop(slot)
        with self._has_news:
            del self._by_number[taken.number]
        if taken.allocation is None:
            self._pool.give_slot(slot)
        else:
            self._pool.free(taken.allocation)

    def _no_room(self, manifest: AdapterManifest) -> NoRoomError:
        pool = self._pool
        return NoRoomError(
            manifest.version,
            needed=pool.num_pages(manifest),
            free=pool.num_pages_free,
            in_use=pool.num_pages_used,
            pinned=0,
            total=pool.num_pages_total,
        )
