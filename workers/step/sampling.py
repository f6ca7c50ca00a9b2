"""Settings by which the tokens of a step's rows are chosen, as plain arrays. The sampler reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[np.void]
"""A structured array of 4-byte fields."""

DRAW = np.dtype([("temperature", "f4"), ("top_p", "f4"), ("top_k", "i4"), ("min_p", "f4"), ("uniform", "f4")])
"""How a row's token is drawn. temperature 0: the likeliest token; top_k 0: of all; uniform: in [0, 1), the chance."""
BIAS = np.dtype([("row", "i4"), ("token_id", "i4"), ("bias", "f4")])
"""What is added to one logit."""
PENALTY = np.dtype([("row", "i4"), ("line", "i4"), ("presence", "f4"), ("frequency", "f4"), ("repetition", "f4")])
"""How a row's repetitions are penalised, by the tokens in its line of the counts."""
START = np.dtype([("line", "i4")])
"""A line that is for another sequence from now on."""
PROMPT = np.dtype([("line", "i4"), ("token_id", "i4")])
"""A token of the prompt of such a sequence."""


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Settings by which tokens are chosen, for the rows to sample."""

    draws: Records
    """(rows,) of `DRAW`."""
    biases: Records
    """`BIAS` of any rows; of one row and token none or several."""
    penalties: Records
    """`PENALTY`, one for each row that has any."""
    starts: Records
    """`START` of lines in `penalties`."""
    prompts: Records
    """`PROMPT` of lines in `starts`, where repetition counts from the prompt on."""
    masked: npt.NDArray[np.int64]
    """The rows that have a mask."""
    masks: npt.NDArray[np.int32]
    """(len(masked), ceil(vocab / 32)): a bit a token, set where it may come; a word's lowest bit is its first token.
    Filled in when the tokens before are known, which may be after the forward pass was launched."""
    num_logprobs: int
    """Alternatives wanted by the row that wants most; -1: no row wants logprobs."""

    @property
    def is_greedy(self) -> bool:
        return not self.draws["temperature"].any()

    @property
    def is_plain(self) -> bool:
        """True if each row takes the likeliest token of its unchanged logits."""
        return self.is_greedy and not len(self.biases) and not len(self.penalties) and not len(self.masked)

    def part(self, start: int, end: int) -> SamplingBatch:
        """Return the settings of the rows from `start` to `end`, which are sampled apart from the others."""
        if (start, end) == (0, len(self.draws)):
            return self
        penalties = _of_rows(self.penalties, start, end)
        within = (self.masked >= start) & (self.masked < end)
        return SamplingBatch(
            draws=self.draws[start:end],
            biases=_of_rows(self.biases, start, end),
            penalties=penalties,
            starts=self.starts[np.isin(self.starts["line"], penalties["line"])],
            prompts=self.prompts[np.isin(self.prompts["line"], penalties["line"])],
            masked=self.masked[within] - start,
            masks=self.masks[within],
            num_logprobs=self.num_logprobs,
        )


def _of_rows(records: Records, start: int, end: int) -> Records:
    found = records[(records["row"] >= start) & (records["row"] < end)]
    found["row"] -= start
    return found


NO_SAMPLING = SamplingBatch(
    np.zeros(0, DRAW),
    np.zeros(0, BIAS),
    np.zeros(0, PENALTY),
    np.zeros(0, START),
    np.zeros(0, PROMPT),
    np.zeros(0, np.int64),
    np.zeros((0, 0), np.int32),
    -1,
)
"""Of no rows."""


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(rows,) in [0, 1), a function of seed and position: SplitMix64 (Steele et al. 2014), begun at the mixed seed."""
    bits = _mix(_mix(seeds) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
