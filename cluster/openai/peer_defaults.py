"""Fields of OpenAI's, vLLM's and SGLang's protocols without an effect here, and the values in which they are accepted.

A client may write out every default of the server that it was made for. Such a value asks for nothing, so it is
accepted; another one would have an effect that is not there, and is refused by name. Null counts as absent everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter, ValidationError

INERT: tuple[object, ...] = (False, "", [], {})
"""What asks for nothing in a field that no protocol here has."""

PEER_DEFAULTS: Mapping[str, tuple[object, ...]] = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "flat_logprobs": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": ([],),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # SGLang's
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "custom_logit_processor": ("",),
    "custom_params": ({},),
    "data_parallel_rank": (),
    "disagg_prefill_dp_rank": (),
    "ebnf": ("",),
    "extra_key": (),
    "input_ids": (),
    "json_schema": ("",),
    "ngram_corpus_id": (),
    "no_stop_trim": (False,),
    "regex": ("",),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "routed_dp_rank": (),
    "routed_experts_start_len": (0,),
    "session_params": ({},),
    "stop_regex": ("", []),
}
"""Fields of a name that a protocol has, and their values without an effect."""

_BOOL = TypeAdapter(bool)
_NUMBER = TypeAdapter(float)


def is_among(value: object, neutral: Sequence[object]) -> bool:
    """True if a JSON value is one of these. Lax, as fields with an effect are: 1.0 is 1, and "true" is true."""
    return any(_is_same(value, each) for each in neutral)


def _is_same(value: object, neutral: object) -> bool:
    try:
        if isinstance(neutral, bool):
            return _BOOL.validate_python(value) is neutral
        if isinstance(neutral, int | float):
            return _NUMBER.validate_python(value) == neutral
    except ValidationError:
        return False
    return type(value) is type(neutral) and value == neutral
