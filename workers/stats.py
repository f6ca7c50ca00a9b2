"""Counters of one engine. The cluster floor turns them into metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from copy import deepcopy
from dataclasses import dataclass, field

from lorafleet.workers.request import FinishReason

MAX_OBSERVATIONS = 4096
"""Durations kept until someone takes them; older ones are dropped."""
LATENCY_BOUNDS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)


def _observations() -> deque[float]:
    return deque(maxlen=MAX_OBSERVATIONS)


@dataclass(slots=True)
class Distribution:
    """Counts of observations at or below each bound, and above the one before it."""

    bounds: tuple[float, ...]
    """Rising."""
    counts: list[int] = field(default_factory=list)
    """One for each bound, and the last for what is above all of them."""
    total: float = 0.0
    """Sum of the observations."""

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def note(self, value: float) -> None:
        """Add an observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class ServedCounts:
    """Counts of an engine's work since it started. Tokens count when they are computed, sequences when they end."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    num_generated_tokens: int = 0
    num_guessed_tokens: int = 0
    """Tokens that steps computed because they were guessed."""
    num_confirmed_tokens: int = 0
    """Of those, the ones that came."""
    num_preemptions: int = 0
    num_finished: Counter[str] = field(default_factory=Counter)
    """By finish reason."""
    first_token_s: Distribution = field(default_factory=lambda: Distribution(LATENCY_BOUNDS_S))
    """From a request's arrival at the engine to its first token."""
    queue_s: Distribution = field(default_factory=lambda: Distribution(LATENCY_BOUNDS_S))
    """From a request's arrival at the engine to its admission, the load of its adapter included."""
    prefill_s: Distribution = field(default_factory=lambda: Distribution(LATENCY_BOUNDS_S))
    """From its admission to its first token."""
    token_s: Distribution = field(default_factory=lambda: Distribution(TOKEN_BOUNDS_S))
    """Of each request, the mean time of its tokens after the first."""
    request_s: Distribution = field(default_factory=lambda: Distribution(LATENCY_BOUNDS_S))
    """From a request's arrival at the engine to its end."""

    def note_first_token(
        self, duration_s: float, queue_s: float, num_prompt_tokens: int, num_cached_tokens: int
    ) -> None:
        """A prompt is computed, and its first token made, `duration_s` after the request's arrival."""
        self.first_token_s.note(duration_s)
        self.queue_s.note(queue_s)
        self.prefill_s.note(duration_s - queue_s)
        self.note_prompt(num_prompt_tokens, num_cached_tokens)

    def note_prompt(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A prompt is computed."""
        self.num_prompt_tokens += num_prompt_tokens
        self.num_cached_tokens += num_cached_tokens

    def note_end(self, reason: FinishReason, duration_s: float, first_token_s: float | None, num_tokens: int) -> None:
        """A sequence ended `duration_s` after its arrival, and had its first token `first_token_s` after it."""
        self.num_finished[reason] += 1
        self.request_s.note(duration_s)
        if first_token_s is not None and num_tokens > 1:
            self.token_s.note((duration_s - first_token_s) / (num_tokens - 1))

    def copy(self) -> ServedCounts:
        """The counts as they are now."""
        return deepcopy(self)


@dataclass(slots=True)
class EngineStats:
    """Written by the engine's thread; others read counters and take durations."""

    num_steps: int = 0
    served: ServedCounts = field(default_factory=ServedCounts)
    last_batch_sequences: int = 0
    last_batch_tokens: int = 0
    step_s: deque[float] = field(default_factory=_observations)

    def note_step(self, num_sequences: int, num_tokens: int, duration_s: float) -> None:
        """A step was computed."""
        self.num_steps += 1
        self.last_batch_sequences = num_sequences
        self.last_batch_tokens = num_tokens
        self.step_s.append(duration_s)

    @staticmethod
    def take(observations: deque[float]) -> list[float]:
        """Remove and return what has been observed."""
        return [observations.popleft() for _ in range(len(observations))]
