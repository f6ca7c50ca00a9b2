"""One answer being generated: its tokens, its KV pages, its lease, and the text that has settled."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from lorafleet.workers.detokenizer import Detokenizer, own_texts
from lorafleet.workers.grammars import Matcher
from lorafleet.workers.memory.residency import AdapterLease
from lorafleet.workers.memory.state_store import NULL_SLOT
from lorafleet.workers.request import EngineRequest, FinishReason, TokenLogprobs
from lorafleet.workers.speculation import Guesser


def pending_token(index: int) -> int:
    """The placeholder of the token that the step in flight chooses for its sampled row `index`."""
    return -1 - index


Vector = npt.NDArray[np.float32]

NEVER = 1 << 62
"""`Sequence.num_base` where the prompt does not have the adapter's invocation."""


def last_occurrence(part: tuple[int, ...], whole: tuple[int, ...]) -> int | None:
    """Return the last index at which `part` begins in `whole`; None if there is none."""
    wanted, tokens = np.array(part), np.array(whole)
    if len(wanted) > len(tokens):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(wanted))
    starts = np.flatnonzero((windows == wanted).all(axis=1))
    return int(starts[-1]) if starts.size else None


class AdapterReadiness(Enum):
    """State of a sequence's adapter."""

    READY = auto()
    LOADING = auto()
    """Its weights are on their way; nothing that another sequence could give up would help."""
    NO_ROOM = auto()
    """It waits for pages that other adapters' leases hold."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one `EngineRequest`. The scheduler moves it, the engine appends to it; one thread."""

    request: EngineRequest
    arrival_s: float
    max_tokens: int
    """Most tokens to make, bounded by the model's length."""
    seed: int
    detokenizer: Detokenizer
    token_ids: list[int]
    """The prompt, then what was made. A token that is being computed is a placeholder, `pending_token(index)`."""
    matcher: Matcher | None = None
    """Follows the answer's grammar, up to the last token that the host knows; None: it has none."""
    guesser: Guesser | None = None
    """Guesses its next tokens; None: they are not to be guessed."""
    num_computed: int = 0
    """Tokens whose KV is in `kv_pages`, or will be when the steps in flight are done."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache gave at the first admission."""
    kv_pages: list[int] = field(default_factory=list)
    num_shared_pages: int = 0
    """The first `kv_pages`, which the prefix cache already knows."""
    state_slot: int = NULL_SLOT
    """Where its recurrent states are, if the base has any and it is admitted."""
    batch_line: int | None = None
    """Its line in the batch builder's arrays."""
    num_tabled_pages: int = 0
    """How many of `kv_pages` stand in that line; 0 when any of them changed."""
    lease: AdapterLease | None = None
    num_base: int = 0
    """First tokens that the base computes alone: those before the adapter's invocation, or all, if it is not there."""
    is_admitted: bool = False
    queue_s: float | None = None
    """From its arrival to its first admission."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_preemptions: int = 0
    first_token_s: float | None = None
    """From its arrival to its first token."""
    finish_reason: FinishReason | None = None
    is_over: bool = False
    """Finished or aborted; steps in flight may still compute rows of it, which are dropped."""
    stop_reason: str | int | None = None
    pooled: Vector | None = None
    """Sum of the hidden states so far that its embedding is made of."""

    @property
    def version(self) -> str | None:
        return self.request.version

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_made(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_complete(self) -> bool:
        """True if its last token is made or in flight, so that it needs no further step."""
        if self.request.pooling is not None:
            return self.num_uncomputed == 0
        return self.num_made >= self.max_tokens

    @property
    def has_pending(self) -> bool:
        """True if its last token is still a placeholder."""
        return self.token_ids[-1] < 0

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed

    def read_lease(self) -> None:
        """Note what the lease tells of the adapter: its own tokens, and whether it begins in the midst of a prompt."""
        if self.lease is None:
            return
        if self.lease.invocation:
            start = last_occurrence(self.lease.invocation, self.request.prompt_token_ids)
            self.num_base = NEVER if start is None else start
        if self.lease.own_tokens:
            self.detokenizer.own_tokens = own_texts(self.lease.own_tokens)

    @property
    def needs_all_rows(self) -> bool:
        """True if each position of its prompt must be computed, even where the prefix cache has its KV."""
        return self.wants_prompt_logprobs or self.request.pooling == "mean"

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs and self.num_made == 0


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """The next `num_rows` uncomputed tokens of a sequence, which one step computes."""

    sequence: Sequence
    num_rows: int
    num_sampled: int
    """How many of these rows, the last ones, choose the token that follows: 1 where the last token is computed.

    More where tokens were guessed, each of which the row before it confirms or not. A sequence with penalties or a
    grammar has one at most: what its row may choose depends on the token chosen before."""
    guess: list[int] = field(default_factory=list)
    """The tokens of those rows but the first, which were guessed: they stand behind the sequence's own."""

    @classmethod
    def of(cls, sequence: Sequence, num_rows: int, guess: list[int] | None = None) -> ScheduledRows:
        """Rows that choose one token if they reach the sequence's last; none where the prompt is to be embedded.

        Behind the last, each token of the guess has a row that chooses one, too.
        """
        guess = guess or []
        is_sampled = num_rows == sequence.num_uncomputed and sequence.request.pooling is None
        return cls(sequence, num_rows + len(guess), is_sampled + len(guess), guess)

    @property
    def token_ids(self) -> list[int]:
        """The tokens of these rows."""
        start = self.sequence.num_computed
        return self.sequence.token_ids[start : start + self.num_rows] + self.guess

    @property
    def num_pooled(self) -> int:
        """Number of these rows, the last ones, that are part of the embedding of the sequence's prompt."""
        pooling = self.sequence.request.pooling
        if pooling == "last":
            return int(self.num_rows == self.sequence.num_uncomputed)
        return 0 if pooling is None else self.num_rows


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Positions of a prompt whose rows give logprobs of the tokens that follow."""

    sequence: Sequence
    start: int
    """The first position."""
    count: int

    @property
    def targets(self) -> list[int]:
        """The tokens that follow."""
        return self.sequence.token_ids[self.start + 1 : self.start + 1 + self.count]
