"""Counters of one engine. The cluster floor turns them into metrics."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from lorafleet.workers.request import FinishReason

MAX_OBSERVATIONS = 4096
"""Durations kept until someone takes them; older ones are dropped."""


def _observations() -> deque[float]:
    return deque(maxlen=MAX_OBSERVATIONS)


@dataclass(slots=True)
class EngineStats:
    """Written by the engine's thread; others read counters and take durations."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_finished: Counter[str] = field(default_factory=Counter)
    """By finish reason."""
    last_batch_sequences: int = 0
    last_batch_tokens: int = 0
    step_s: deque[float] = field(default_factory=_observations)
    first_token_s: deque[float] = field(default_factory=_observations)
    """From a request's arrival at the engine to its first token."""

    def note_step(self, num_sequences: int, num_tokens: int, duration_s: float) -> None:
        """A step was computed."""
        self.num_steps += 1
        self.last_batch_sequences = num_sequences
        self.last_batch_tokens = num_tokens
        self.step_s.append(duration_s)

    def note_first_token(self, duration_s: float) -> None:
        """A sequence got its first token."""
        self.first_token_s.append(duration_s)

    def note_finish(self, reason: FinishReason, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        """A sequence ended."""
        self.num_finished[reason] += 1
        self.num_prompt_tokens += num_prompt_tokens
        self.num_generated_tokens += num_generated_tokens

    @staticmethod
    def take(observations: deque[float]) -> list[float]:
        """Remove and return what has been observed."""
        return [observations.popleft() for _ in range(len(observations))]
