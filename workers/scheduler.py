"""Decides which sequences compute how many tokens in the next step.

Continuous batching with chunked prefill: decodes come first, then prefills in chunks, all under one token budget. A
waiting sequence is admitted only when its KV pages and its adapter are there. One that does not fit is passed over, for
at most `max_wait_s`. Later sequences may then not take the pages or the adapter room that it waits for.
When KV runs out, the sequence admitted last gives its pages back and is computed anew. Pure logic over page counts: no
tensors, no threads, and a clock passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from types import MappingProxyType
from typing import Protocol

from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.state_store import NULL_SLOT, StateStore
from lorafleet.workers.sequence import AdapterReadiness, ScheduledRows, Sequence
from lorafleet.workers.step_budget import StepBudget

NO_GUESSES: Mapping[Sequence, list[int]] = MappingProxyType({})


class AdapterGate(Protocol):
    """Makes adapters resident."""

    def try_ready(self, sequence: Sequence) -> AdapterReadiness:
        """Take the lease of the sequence's version if need be and possible, and say whether it is resident."""

    def is_coming(self, version: str) -> bool:
        """Return True if the version has its pages and is being written into them."""


@dataclass(slots=True)
class _Budget:
    """The room that is left in one step."""

    tokens: int


class Scheduler:
    """Queues of one engine. Called by the engine's thread only."""

    def __init__(
        self,
        cache: KVCache,
        gate: AdapterGate,
        states: StateStore,
        *,
        max_batch_tokens: int,
        max_running: int,
        max_wait_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._gate = gate
        self._states = states
        self._step_budget = StepBudget(max_batch_tokens)
        # Every running sequence needs a token a step, or the last ones would stand still.
        self._max_running = min(max_running, max_batch_tokens)
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences of which a step computes one token, the last."""
        return [each for each in self._running if not each.is_complete and each.num_uncomputed == 1]

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back its memory and its lease."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._release_memory(sequence)
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None

    def schedule(self, guesses: Mapping[Sequence, list[int]] = NO_GUESSES) -> list[ScheduledRows]:
        """The next step's work; empty when nothing can run now. `guesses`: tokens that may follow, by sequence."""
        scheduled: dict[Sequence, int] = {}
        decoding = self.decoding
        budget = _Budget(self._step_budget.next_step(len(decoding), self._num_prompt_tokens()))
        # Prompts would take all of it, and guesses have been paid for. Half of what decodes leave is for prompts.
        for_guesses = min(sum(map(len, guesses.values())), max(0, budget.tokens - len(decoding)) // 2)
        budget.tokens -= for_guesses
        prefilling = [each for each in self._running if not each.is_complete and each.num_uncomputed > 1]
        for sequence in (*decoding, *prefilling):
            if sequence.is_admitted:  # a victim of an earlier one is not
                self._schedule_running(sequence, scheduled, budget)
        self._admit(scheduled, budget)
        self._step_budget.note(budget.tokens)
        budget.tokens += for_guesses
        return [
            ScheduledRows.of(sequence, num_rows, self._take_guess(sequence, guesses.get(sequence, []), budget))
            for sequence, num_rows in scheduled.items()
        ]

    def _num_prompt_tokens(self) -> int:
        """Of sequences that may run, but for those that decode."""
        admissible = islice(self._waiting, self._max_running - len(self._running))
        counts = (each.num_uncomputed for each in chain(self._running, admissible))
        return sum(count for count in counts if count > 1)

    def _schedule_running(self, sequence: Sequence, scheduled: dict[Sequence, int], budget: _Budget) -> None:
        num_rows = min(sequence.num_uncomputed, budget.tokens)
        if num_rows == 0:
            return
        missing = self._missing_pages(sequence, sequence.num_computed + num_rows)
        if missing:
            while not self._cache.can_allocate(missing):
                victim = next(running for running in reversed(self._running) if running not in scheduled)
                self._preempt(victim)
                if victim is sequence:
                    return
            sequence.kv_pages += self._cache.allocate(missing)
        self._take(sequence, num_rows, scheduled, budget)

    def _take_guess(self, sequence: Sequence, guess: list[int], budget: _Budget) -> list[int]:
        """Give guessed tokens the room that others left; return those that have some. Nobody is preempted for them."""
        guess = guess[: budget.tokens]
        missing = self._missing_pages(sequence, len(sequence.token_ids) + len(guess))
        if not guess or not self._cache.can_allocate(missing):
            return []
        sequence.kv_pages += self._cache.allocate(missing)
        budget.tokens -= len(guess)
        return guess

    def _admit(self, scheduled: dict[Sequence, int], budget: _Budget) -> None:
        now = self._clock()
        adapters_held_back = False
        for sequence in list(self._waiting):
            if len(self._running) >= self._max_running or budget.tokens == 0:
                return
            if sequence.has_pending:  # preempted while its token was in flight
                continue
            is_overdue = now - sequence.arrival_s > self._max_wait_s
            if sequence.version is not None:
                # Behind an overdue one that waits for adapter pages, no further adapter takes any, and none that is
                # there is leased anew, or it might never go. Who joins one that is coming keeps it no longer than those
                # do that it comes for.
                if adapters_held_back and sequence.lease is None and not self._gate.is_coming(sequence.version):
                    continue
                readiness = self._gate.try_ready(sequence)
                if readiness is AdapterReadiness.NO_ROOM:
                    adapters_held_back |= is_overdue
                if readiness is not AdapterReadiness.READY:
                    continue
            if not self._try_admit(sequence, scheduled, budget) and is_overdue:
                return

    def _try_admit(self, sequence: Sequence, scheduled: dict[Sequence, int], budget: _Budget) -> bool:
        sequence.read_lease()
        use_prefix = not sequence.needs_all_rows
        if use_prefix:
            sequence.kv_pages = self._cache.acquire_prefix(
                sequence.version, sequence.token_ids, sequence.request.cache_salt, sequence.num_base
            )
        num_cached = len(sequence.kv_pages) * self._cache.page_tokens
        # Room for the whole prompt and the first token, so that an admitted sequence gets somewhere.
        missing = self._missing_pages(sequence, len(sequence.token_ids) + 1)
        sequence.num_computed = num_cached
        num_rows = min(sequence.num_uncomputed, budget.tokens)
        if num_rows == 0 or not self._cache.can_allocate(missing):
            self._release_memory(sequence)
            return num_rows == 0
        sequence.kv_pages += self._cache.allocate(missing)
        if sequence.num_preemptions == 0:
            sequence.num_cached = num_cached
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.is_admitted = True
        sequence.state_slot = self._states.acquire()
        if sequence.queue_s is None:
            sequence.queue_s = self._clock() - sequence.arrival_s
        self._take(sequence, num_rows, scheduled, budget)
        return True

    def _take(self, sequence: Sequence, num_rows: int, scheduled: dict[Sequence, int], budget: _Budget) -> None:
        scheduled[sequence] = num_rows
        budget.tokens -= num_rows

    def _missing_pages(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, self._cache.pages_for(num_tokens) - len(sequence.kv_pages))

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue without memory; its adapter stays leased, so it resumes on the same version."""
        self._running.remove(sequence)
        self._release_memory(sequence)
        sequence.is_admitted = False
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.appendleft(sequence)

    def _release_memory(self, sequence: Sequence) -> None:
        self._cache.free(sequence.kv_pages)
        sequence.kv_pages = []
        sequence.num_shared_pages = 0
        sequence.num_tabled_pages = 0
        sequence.num_computed = 0
        self._states.release(sequence.state_slot)
        sequence.state_slot = NULL_SLOT
