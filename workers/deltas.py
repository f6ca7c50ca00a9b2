"""The deltas of answers: what a token adds to the text, and whether it ends the answer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lorafleet.workers.request import GenerateDelta, TokenLogprobs
from lorafleet.workers.sequence import Sequence


def token_delta(
    sequence: Sequence,
    place: int,
    logprobs: tuple[TokenLogprobs, ...] | None,
    *,
    base_end_ids: frozenset[int],
    waits_s: tuple[float, float] | None,
    worker_id: str,
) -> GenerateDelta:
    """Add the token at `place` to the sequence's text. Sets the sequence's finish reason if the token ends it.

    base_end_ids: tokens that end the base's answers. waits_s: as in `GenerateDelta`, with the first token.
    """
    sampling, matcher = sequence.request.sampling, sequence.matcher
    token_id = sequence.token_ids[place]
    num_made = place + 1 - sequence.num_prompt
    past_min = num_made >= sampling.min_tokens
    is_end = token_id in base_end_ids or token_id in sequence.request.end_token_ids
    if token_id in sampling.stop_token_ids and past_min:
        sequence.finish_reason, sequence.stop_reason = "stop", token_id
    elif not sampling.ignore_eos and past_min and is_end:
        sequence.finish_reason = "stop"
    elif matcher is not None and is_end:
        sequence.finish_reason = "stop"  # a grammar has no other place for it than its end
    elif num_made >= sequence.max_tokens:
        sequence.finish_reason = "length"
    # A token that ends the answer is no part of its text, unless that is asked for.
    is_said = sequence.finish_reason != "stop" or sampling.include_stop_str_in_output
    said = (token_id,) if is_said else ()
    if matcher is not None and matcher.is_over:
        sequence.finish_reason = "stop"
    text = sequence.detokenizer.append(said, check_stop=past_min)
    if sequence.detokenizer.matched_stop is not None:
        sequence.finish_reason, sequence.stop_reason = "stop", sequence.detokenizer.matched_stop
    elif sequence.finish_reason is not None:
        text += sequence.detokenizer.flush()
    prompt_logprobs = None
    if num_made == 1 and sampling.prompt_logprobs:
        prompt_logprobs = (TokenLogprobs(sequence.token_ids[0], None, ()), *sequence.prompt_logprobs)
    return GenerateDelta(
        index=0,
        token_ids=(token_id,),
        text=text,
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        num_prompt_tokens=sequence.num_prompt,
        num_cached_tokens=sequence.num_cached,
        prompt_logprobs=prompt_logprobs,
        stop_reason=sequence.stop_reason,
        worker_id=worker_id,
        version=sequence.version,
        waits_s=waits_s,
    )


def embedding_delta(sequence: Sequence, vector: npt.NDArray[np.floating], worker_id: str) -> GenerateDelta:
    """The only delta of a prompt that is embedded. vector: (width,)."""
    return GenerateDelta(
        index=0,
        token_ids=(),
        text="",
        logprobs=None,
        finish_reason="stop",
        num_prompt_tokens=sequence.num_prompt,
        num_cached_tokens=sequence.num_cached,
        worker_id=worker_id,
        version=sequence.version,
        embedding=vector.astype("<f4").tobytes(),
    )
