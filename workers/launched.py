"""A step that is computing: whose its rows are, and what the tokens that it chooses are worth."""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.workers.model.runner import StepInFlight
from lorafleet.workers.sequence import PromptRows, Sequence
from lorafleet.workers.stats import ServedCounts


@dataclass(frozen=True, slots=True)
class LaunchedRows:
    """One sequence's part of a step in flight."""

    sequence: Sequence
    num_computed: int
    """Tokens whose KV is there after the step."""
    num_preemptions: int
    """The sequence's at launch: pages it has after another preemption are not this step's."""


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of a step in flight that chooses a token."""

    sequence: Sequence
    place: int
    """Of the token among the sequence's."""
    guess: int | None
    """The token that the sequence's next row takes for this one; None: it has no next row."""


@dataclass(slots=True)
class LaunchedStep:
    """One step, from its launch to the collection of what it made."""

    step: StepInFlight
    num_rows: int
    """Without padding."""
    rows: tuple[LaunchedRows, ...]
    sampled: tuple[SampledRow, ...]
    prompts: tuple[PromptRows, ...]
    pooled: tuple[tuple[LaunchedRows, int], ...]
    """With the number of its rows, each sequence that the step pools hidden states of."""
    started_s: float
    is_followed: bool = False
    """Whether the grammars have taken the step's tokens."""

    @property
    def has_guesses(self) -> bool:
        """True if some rows are of tokens that were guessed."""
        return any(row.guess is not None for row in self.sampled)

    def settle(self, token_ids: list[int], counts: ServedCounts) -> list[int]:
        """Put the chosen tokens in their places, and drop what follows a guess that did not come.

        token_ids: chosen by each row of `sampled`. Returns the indices of the rows that stand.
        """
        standing: list[int] = []
        refuted: Sequence | None = None
        for index, row in enumerate(self.sampled):
            sequence = row.sequence
            counts.num_guessed_tokens += row.guess is not None
            if sequence is refuted:
                continue
            standing.append(index)
            sequence.token_ids[row.place] = token_ids[index]
            if row.guess == token_ids[index]:
                counts.num_confirmed_tokens += 1
            elif row.guess is not None:
                refuted = sequence
                del sequence.token_ids[row.place + 1 :]
                sequence.num_computed = min(sequence.num_computed, row.place)
        return standing
