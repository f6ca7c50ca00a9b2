"""A step that is computing: whose its rows are, and what the tokens that it chooses are worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.model.runner import StepInFlight
from lorafleet.workers.request import TokenLogprobs
from lorafleet.workers.sequence import PromptRows, ScheduledRows, Sequence, pending_token
from lorafleet.workers.stats import ServedCounts


@dataclass(frozen=True, slots=True)
class LaunchedRows:
    """One sequence's part of a step in flight."""

    sequence: Sequence
    num_computed: int
    """Tokens whose KV is there after the step."""
    num_preemptions: int
    """The sequence's at launch: pages it has after another preemption are not this step's."""

    @classmethod
    def of(cls, sequence: Sequence) -> LaunchedRows:
        """The part of the step that was launched last."""
        return cls(sequence, sequence.num_computed, sequence.num_preemptions)

    def share_pages(self, cache: KVCache) -> None:
        """Offer the pages that this step filled to the prefix cache."""
        sequence = self.sequence
        num_computed = min(self.num_computed, sequence.num_computed)
        num_full = num_computed // cache.page_tokens
        is_same_run = self.num_preemptions == sequence.num_preemptions and not sequence.is_over
        if is_same_run and num_full > sequence.num_shared_pages:
            tokens = sequence.token_ids[:num_computed]
            salt = sequence.request.cache_salt
            kept = cache.insert(sequence.version, tokens, sequence.kv_pages, salt, sequence.num_base)
            if kept != sequence.kv_pages:
                sequence.kv_pages = kept
                sequence.num_tabled_pages = 0
            sequence.num_shared_pages = num_full


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

    @classmethod
    def of(
        cls,
        step: StepInFlight,
        scheduled: tuple[ScheduledRows, ...],
        prompts: tuple[PromptRows, ...],
        started_s: float,
    ) -> LaunchedStep:
        """Count the rows of `scheduled` as computed, and put placeholders where `step` chooses tokens."""
        num_pooled = [item.num_pooled for item in scheduled]
        for item in scheduled:
            item.sequence.num_computed += item.num_rows
        rows = tuple(LaunchedRows.of(item.sequence) for item in scheduled)
        pooled = tuple((row, count) for row, count in zip(rows, num_pooled, strict=True) if count)
        sampled = tuple(
            SampledRow(item.sequence, len(item.sequence.token_ids) + number, guess)
            for item in scheduled
            if item.num_sampled
            for number, guess in enumerate((*item.guess, None))
        )
        for index, row in enumerate(sampled):
            row.sequence.token_ids.append(pending_token(index))
        num_rows = sum(item.num_rows for item in scheduled)
        return cls(step, num_rows, rows, sampled, prompts, pooled, started_s)

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

    def follow(self) -> None:
        """Wait for the step, and let the grammars take its tokens. The second call does nothing."""
        self.step.wait()
        if self.is_followed:
            return
        self.is_followed = True
        token_ids: list[int] = []
        for index, row in enumerate(self.sampled):
            if row.sequence.matcher is not None and not row.sequence.is_over:
                assert self.step.sampled is not None
                token_ids = token_ids or self.step.sampled.token_ids.tolist()
                row.sequence.matcher.take(token_ids[index])

    def note_prompt_logprobs(self) -> None:
        """Add what the step found of prompts' tokens to their sequences."""
        chosen = self.step.prompts
        if chosen is None:
            return
        assert chosen.logprobs is not None
        logprobs = chosen.logprobs.tolist()
        row = 0
        for rows in self.prompts:
            sequence, num_top = rows.sequence, rows.sequence.request.sampling.prompt_tops
            for position in range(rows.start + 1, rows.start + 1 + rows.count):
                # After a preemption positions come again; those that were noted stand.
                if position == len(sequence.prompt_logprobs) + 1:
                    found = TokenLogprobs(sequence.token_ids[position], logprobs[row], chosen.top(row, num_top))
                    sequence.prompt_logprobs.append(found)
                row += 1

    def embedded(self) -> Iterator[Sequence]:
        """Add what the step left of prompts to their embeddings; yields the sequences whose embedding is whole."""
        for index, (row, num_rows) in enumerate(self.pooled):
            sequence = row.sequence
            if sequence.is_over or row.num_preemptions != sequence.num_preemptions:
                continue
            assert self.step.pooled is not None
            found = self.step.pooled[index].numpy()
            is_first = sequence.pooled is None or row.num_computed == num_rows
            sequence.pooled = found if is_first else sequence.pooled + found
            if row.num_computed == sequence.num_prompt:
                yield sequence
