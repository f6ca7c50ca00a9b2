"""State of a worker: the entries of `GET /admin/v1/workers`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafleet.workers.config import Settings


class KVPages(Settings):
    """KV pages by holder."""

    used: int = Field(description="Held by live requests.")
    cached: int = Field(description="Held by the prefix cache alone, which would give them back.")
    total: int


class StateSlots(Settings):
    """Slots of recurrent states. Where there are any, there is no prefix cache."""

    used: int = Field(description="Held by running requests.")
    total: int
    slot_bytes: int = Field(description="Bytes that one sequence takes over all layers.")


class AdapterPages(Settings):
    """Pages of the adapter pool."""

    used: int
    total: int


class ResidentAdapter(Settings):
    """One adapter version in a worker's memory."""

    name: str | None = Field(
        default=None, description="A name that points at the version, of several the first; null once none does."
    )
    version: str
    rank: int
    pages: int
    pinned: bool = Field(description="Whether any of its names is pinned.")
    leases: int = Field(description="Requests that use it now.")
    state: Literal["loading", "resident", "retired"]


class RankState(Settings):
    """One process of a worker, with a device of its own."""

    rank: int
    pid: int
    device: str
    silent_s: float = Field(description="Seconds since the rank was last heard; 0 for rank 0, which answers.")


class WorkerState(Settings):
    """One worker, now."""

    worker_id: str
    pid: int
    node_id: str
    device: str
    running: int = Field(description="Sequences in the running batch.")
    waiting: int = Field(description="Sequences that wait to be admitted.")
    leases: int = Field(description="Requests that hold an adapter version.")
    kv_pages: KVPages
    state_slots: StateSlots | None = Field(default=None, description="null for a base without recurrent layers.")
    adapter_pages: AdapterPages
    ranks: tuple[RankState, ...] = Field(
        default=(), description="The worker's processes: one, or `worker.tensor_parallel_size`."
    )
    adapters: tuple[ResidentAdapter, ...]
