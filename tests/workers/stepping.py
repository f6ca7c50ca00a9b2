"""Plays the engine around a scheduler: computes nothing, but accounts as the engine does."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import torch

from lorafleet.workers.detokenizer import Detokenizer
from lorafleet.workers.memory.kv_cache import KVCache, LayerKV
from lorafleet.workers.memory.state_store import NULL_SLOT, StateShape, StateStore
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.scheduler import Scheduler
from lorafleet.workers.sequence import AdapterReadiness, ScheduledRows, Sequence, pending_token
from tests.support.clock import Clock

PAGE_TOKENS = 4

_ids = itertools.count()


class Lease:
    """Counts itself out, once."""

    def __init__(self, gate: Gate, version: str) -> None:
        self.gate = gate
        self.version = version
        self.invocation = ()
        self.own_tokens = ()
        gate.leases[version] += 1

    def release(self) -> None:
        self.gate.leases[self.version] -= 1
        assert self.gate.leases[self.version] >= 0


class Gate:
    """A pool that holds `capacity` adapters of equal size, and evicts those without a lease. Loading takes a step."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.resident: list[str] = []
        self.loading: list[str] = []
        self.leases: Counter[str] = Counter()
        self.is_loading_held_up = False

    def try_ready(self, sequence: Sequence) -> AdapterReadiness:
        version = sequence.version
        assert version is not None
        if sequence.lease is not None:
            return AdapterReadiness.READY if version in self.resident else AdapterReadiness.LOADING
        if version in self.resident:
            sequence.lease = Lease(self, version)  # type: ignore[assignment]
            return AdapterReadiness.READY
        if version in self.loading:
            sequence.lease = Lease(self, version)  # type: ignore[assignment]
            return AdapterReadiness.LOADING
        if len(self.resident) + len(self.loading) == self.capacity:
            victim = next((one for one in self.resident if not self.leases[one]), None)
            if victim is None:
                return AdapterReadiness.NO_ROOM
            self.resident.remove(victim)
        self.loading.append(version)
        sequence.lease = Lease(self, version)  # type: ignore[assignment]
        return AdapterReadiness.LOADING

    def is_coming(self, version: str) -> bool:
        return version in self.loading

    def tick(self) -> None:
        if not self.is_loading_held_up:
            self.resident += self.loading
            self.loading.clear()


@dataclass
class Step:
    """What one step did."""

    rows: list[ScheduledRows]
    counts: dict[Sequence, int]
    """Rows of each sequence, in the order in which they were scheduled."""
    sampled: list[tuple[Sequence, int]]
    """(sequence, place of its new token)."""


@dataclass
class Stepping:
    """A scheduler over a real KV cache of tiny pages. With `lag`, a step is collected after the next is launched."""

    num_pages: int = 64
    max_batch_tokens: int = 32
    max_running: int = 8
    max_wait_s: float = 2.0
    capacity: int = 4
    lag: bool = False
    prefix_cache: bool = True
    clock: Clock = field(default_factory=Clock)
    steps: list[Step] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = Gate(self.capacity)
        self.cache = KVCache(
            [LayerKV(num_kv_heads=1, head_dim=1)],
            num_pages=self.num_pages,
            page_tokens=PAGE_TOKENS,
            dtype=torch.float32,
            device=torch.device("cpu"),
            prefix_cache=self.prefix_cache,
        )
        shapes = {"layer": StateShape((1,), torch.float32)}
        self.states = StateStore(shapes, num_slots=self.max_running, device=torch.device("cpu"))
        self.scheduler = Scheduler(
            self.cache,
            self.gate,
            self.states,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            max_wait_s=self.max_wait_s,
            clock=self.clock,
        )
        self._in_flight: Step | None = None

    def add(
        self,
        num_prompt: int,
        max_tokens: int = 4,
        version: str | None = None,
        *,
        prompt: tuple[int, ...] | None = None,
        prompt_logprobs: bool = False,
    ) -> Sequence:
        """Queue a sequence with a prompt of its own, unless one is given."""
        number = next(_ids)
        prompt = prompt or tuple(1000 * number + token for token in range(num_prompt))
        sampling = SamplingParams(prompt_logprobs=prompt_logprobs)
        sequence = Sequence(
            request=EngineRequest(str(number), version, prompt, sampling),
            arrival_s=self.clock.now_s,
            max_tokens=max_tokens,
            seed=0,
            detokenizer=Detokenizer(None, (), prompt),
            token_ids=list(prompt),
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> dict[Sequence, int]:
        """One round of the engine's loop: rows that each sequence was given."""
        self.gate.tick()
        rows = self.scheduler.schedule()
        launched = self._launch(rows) if rows else None
        if self.lag:
            collected, self._in_flight = self._in_flight, launched
        else:
            collected = launched
        if collected is not None:
            self._collect(collected)
        return launched.counts if launched else {}

    def finish(self, sequence: Sequence) -> None:
        sequence.is_over = True
        self.scheduler.finish(sequence)
        self.finished.append(sequence)

    def run(self, max_steps: int = 1000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.live and self._in_flight is None:
                return
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps")

    @property
    def live(self) -> list[Sequence]:
        return list(self.scheduler)

    def check(self) -> None:
        """Pages, slots and leases belong to live sequences, and to nobody else."""
        held = {page for sequence in self.live for page in sequence.kv_pages}
        assert self.cache.counts.used == len(held)
        for sequence in self.live:
            assert len(sequence.kv_pages) * PAGE_TOKENS >= sequence.num_computed
            assert sequence.is_admitted or not sequence.kv_pages
        slots = [sequence.state_slot for sequence in self.live if sequence.is_admitted]
        assert len({*slots, NULL_SLOT}) == len(slots) + 1, "each has a slot of its own"
        assert self.states.counts.used == len(slots) == sum(one.state_slot != NULL_SLOT for one in self.live)
        leased = Counter(sequence.version for sequence in self.live if sequence.lease is not None)
        assert +self.gate.leases == leased
        assert self.scheduler.num_running <= self.max_running

    def _launch(self, rows: list[ScheduledRows]) -> Step:
        counts = {item.sequence: item.num_rows for item in rows}
        assert len(counts) == len(rows), "a sequence is scheduled twice"
        assert sum(counts.values()) <= self.max_batch_tokens
        sampled = [item.sequence for item in rows if item.num_sampled]
        for one, count in counts.items():
            assert 0 < count <= one.num_uncomputed
            one.num_computed += count
            assert len(one.kv_pages) * PAGE_TOKENS >= one.num_computed, "rows without pages"
        step = Step(rows, counts, [(one, len(one.token_ids)) for one in sampled])
        for index, one in enumerate(sampled):
            one.token_ids.append(pending_token(index))
        self.steps.append(step)
        return step

    def _collect(self, step: Step) -> None:
        for one in step.counts:
            num_full = min(one.num_computed, len(one.token_ids) - 1) // PAGE_TOKENS
            if not one.is_over and one.is_admitted and num_full > one.num_shared_pages:
                tokens = one.token_ids[: num_full * PAGE_TOKENS]
                if min(tokens) >= 0:
                    one.kv_pages = self.cache.insert(one.version, tokens, one.kv_pages)
                    one.num_shared_pages = num_full
        for one, place in step.sampled:
            one.token_ids[place] = one.num_prompt + place
            if not one.is_over and place + 1 - one.num_prompt >= one.max_tokens:
                self.finish(one)
