"""Guesses the next tokens of sequences, so that one step may confirm several: prompt look-up (Saxena 2023).

A guess is what followed the last time that the sequence's latest tokens stood in it. A step computes the guessed tokens
as further rows. Each row chooses its token as it would without guesses, by its own seed and position, and a guess
stands if the row before it chose just that token. So answers do not depend on guesses, greedy or sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NGRAM_TOKENS = 3
"""Latest tokens that must have stood in the sequence before."""
MAX_INDEXED = 4096
"""Tokens indexed at a time, so that a long prompt holds up no step."""
MAX_ROWS = 64
"""Rows of a step with guesses. So many take a GPU hardly longer than one: it reads all weights anyway."""
MIN_GAIN = 0.5
"""Tokens that a step must be expected to gain for each sequence. Guessing has its price: the host must know a step's
tokens before it launches the next one."""
FIRST_CONFIDENCE = 0.5
CONFIDENCE_STEP = 0.15
"""Weight of the latest guess in the confidence."""


class Guesser:
    """Guesses for one sequence. Learns from each token if it would have guessed it, also while it is not asked."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._token_ids = list(prompt)
        self._follower: dict[tuple[int, ...], int] = {}
        """By n-gram: place of the token that followed it last."""
        self._num_indexed = 0
        """First tokens that are in `_follower`, as what follows."""
        self.confidence = FIRST_CONFIDENCE
        """Share of guessed tokens that came, the latest counting most."""

    def take(self, token_id: int) -> None:
        """The sequence goes on with this token."""
        guess = self.guess(1)
        if guess:
            self.confidence += CONFIDENCE_STEP * ((guess[0] == token_id) - self.confidence)
        self._token_ids.append(token_id)
        end = min(len(self._token_ids), self._num_indexed + MAX_INDEXED)
        for place in range(max(NGRAM_TOKENS, self._num_indexed), end):
            self._follower[tuple(self._token_ids[place - NGRAM_TOKENS : place])] = place
        self._num_indexed = end

    def guess(self, count: int) -> list[int]:
        """The next `count` tokens, as far as there is a guess: all or none. Goes round where the sequence repeats."""
        known = self._token_ids
        start = self._follower.get(tuple(known[-NGRAM_TOKENS:]))
        if start is None:
            return []
        period = len(known) - start
        return [known[start + index % period] for index in range(count)]

    def gain(self, count: int) -> float:
        """Tokens that a step is expected to make beside its first with `count` guesses; 0 without a guess now."""
        if tuple(self._token_ids[-NGRAM_TOKENS:]) not in self._follower:
            return 0.0
        return sum(self.confidence**number for number in range(1, count + 1))


def pays(guessers: Sequence[Guesser | None], count: int) -> bool:
    """Return True if `count` guesses for each sequence of a step are expected to save time. None: it has no guesser."""
    if not guessers or len(guessers) * (1 + count) > MAX_ROWS:
        return False
    gains = (guesser.gain(count) for guesser in guessers if guesser is not None)
    return sum(gains) >= MIN_GAIN * len(guessers)
