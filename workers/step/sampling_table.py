"""Sampling settings of each sequence, in arrays: one line a sequence, set once and gathered every step."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any

import numpy as np
import numpy.typing as npt

from lorafleet.workers.sequence import Sequence
from lorafleet.workers.step.sampling import BIAS, DRAW, PENALTY, PROMPT, START, Records, SamplingBatch, uniforms

Ints = npt.NDArray[np.integer[Any]]

MIN_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: logits divided by less overflow."""
MAX_COUNT = 2**31 - 1
"""Requests may name any number; more than this means no more than this."""
FORBIDDEN = -1e30
"""The bias of a token that may not come: finite, so that where none may come there is still one that is taken."""

_LINE = np.dtype(
    [
        ("draw", DRAW),
        ("penalty", PENALTY),
        ("is_penalised", "?"),
        ("is_biased", "?"),
        ("min_tokens", "i4"),
        ("num_logprobs", "i4"),
        ("seed", "u8"),
    ]
)


class SamplingTable:
    """Makes each step's `SamplingBatch`."""

    def __init__(self, stop_token_ids: frozenset[int], vocab_size: int) -> None:
        """`stop_token_ids`: the base's own, which may not come before `min_tokens`."""
        self._num_mask_words = -(-vocab_size // 32)
        self._stop_token_ids = stop_token_ids
        self._lines = np.zeros(0, dtype=_LINE)
        self._biases: dict[int, Records] = {}
        """`BIAS` by line, where there are any."""
        self._forbidden: dict[int, Records] = {}
        """`BIAS` by line of what may not come before `min_tokens`, where there is such a bound."""

    def grow(self, num_lines: int) -> None:
        """Have so many lines more."""
        self._lines = np.concatenate([self._lines, np.zeros(num_lines, dtype=_LINE)])

    def put(self, line: int, sequence: Sequence) -> None:
        """A line is for this sequence from now on."""
        asked = sequence.request.sampling
        temperature = asked.temperature if asked.temperature >= MIN_TEMPERATURE else 0.0
        self._lines[line] = (
            (temperature, asked.top_p, min(max(asked.top_k, 0), MAX_COUNT), asked.min_p, 0.0),
            (0, line, asked.presence_penalty, asked.frequency_penalty, asked.repetition_penalty),
            asked.has_penalties,
            bool(asked.logit_bias),
            min(asked.min_tokens, MAX_COUNT),
            -1 if asked.logprobs is None else asked.logprobs,
            sequence.seed & (2**64 - 1),
        )
        if asked.logit_bias:
            self._biases[line] = _records(BIAS, 0, list(asked.logit_bias), list(asked.logit_bias.values()))
        if asked.min_tokens:
            ends = [*self._stop_token_ids, *asked.stop_token_ids, *sequence.request.end_token_ids]
            self._forbidden[line] = _records(BIAS, 0, ends, FORBIDDEN)

    def batch(self, sampled: Several[Sequence], lines: Ints, positions: npt.NDArray[np.int64]) -> SamplingBatch:
        """Gather the settings of rows. `sampled`: their sequences. `lines`: the lines of these, one a row.

        positions: (rows,), of the rows. Rows of one sequence, if several, are neighbours.
        """
        settings = self._lines.take(lines)  # which copies whole records; indexing copies field by field
        num_made = positions + 1 - np.array([sequence.num_prompt for sequence in sampled], dtype=np.int64)
        draws = settings["draw"].copy()
        draws["uniform"] = uniforms(settings["seed"], num_made)
        penalised = np.flatnonzero(settings["is_penalised"])
        penalties = settings["penalty"][penalised]
        penalties["row"] = penalised
        starts = penalties[num_made[penalised] == 0]
        prompts = [
            _records(PROMPT, start["line"], sampled[start["row"]].request.prompt_token_ids)
            for start in starts[starts["repetition"] != 1.0]
        ]
        biased, early = np.flatnonzero(settings["is_biased"]), np.flatnonzero(num_made < settings["min_tokens"])
        parts = [self._biases[line] for line in lines[biased].tolist()]
        parts += [self._forbidden[line] for line in lines[early].tolist()]
        biases = _joined(BIAS, parts)
        biases["row"] = np.repeat(np.concatenate([biased, early]), [len(part) for part in parts])
        masked = np.array([i for i, sequence in enumerate(sampled) if sequence.matcher is not None], dtype=np.int64)
        for dependent in (penalised, masked):
            assert np.diff(lines[dependent]).all(), "a sequence has several such rows: see ScheduledRows.num_sampled"
        masks = np.zeros((len(masked), self._num_mask_words), dtype=np.int32)
        return SamplingBatch(
            draws=draws,
            biases=biases,
            penalties=penalties,
            starts=starts["line"].astype(START),
            prompts=_joined(PROMPT, prompts),
            masked=masked,
            masks=masks,
            num_logprobs=int(settings["num_logprobs"].max(initial=-1)),
        )


def _records(kind: np.dtype[np.void], first: object, token_ids: Several[int], *others: object) -> Records:
    """A record for each token id; the other fields are one value for all, or a list."""
    records = np.zeros(len(token_ids), dtype=kind)
    for name, values in zip(kind.names or (), (first, token_ids, *others), strict=True):
        records[name] = values
    return records


def _joined(kind: np.dtype[np.void], parts: list[Records]) -> Records:
    # As plain numbers, which numpy joins a hundred times faster than records.
    words = [part.view(np.int32) for part in parts]
    return np.concatenate([np.zeros(0, dtype=np.int32), *words]).view(kind)
