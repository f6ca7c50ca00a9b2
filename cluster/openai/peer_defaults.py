"""Fields of OpenAI's, vLLM's and SGLang's protocols without an effect here, and the values in which they are accepted.

A client may write out every default of the server that it was made for. Such a value asks for nothing, so it is
accepted; another one would have an effect that is not there, and is refused by name. Null counts as absent everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter, ValidationError

INERT: tuple[object, ...] = (False, 0, 0.0, "", [], {})
"""What asks for nothing in a field that no protocol here has."""

PEER_DEFAULTS: Mapping[str, tuple[object, ...]] = {
    # OpenAI's
    "audio": (),
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
    "ec_transfer_params": ({},),
    "flat_logprobs": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": ([],),
    "repetition_detection": (),
    "return_mm_kwargs": (True, False),
    "return_prompt_text": (False,),
    "return_token_offsets": (True, False),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
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
    "images_config": ({},),
    "input_ids": (),
    "json_schema": ("",),
    "max_dynamic_patch": (),
    "min_dynamic_patch": (),
    "ngram_corpus_id": (),
    "no_stop_trim": (False,),
    "regex": ("",),
    "return_cached_tokens_details": (False,),
    "return_flat_raw_output_top_logprobs": (False,),
    "return_flat_raw_top_logprobs_b64": (True,),
    "return_hidden_states": (False,),
    "return_input_ids_in_sglext": (False,),
    "return_meta_info": (False,),
    "return_output_ids_in_sglext": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "return_sampling_mask": (False,),
    "return_spec_tokens_details": (False,),
    "routed_dp_rank": (),
    "routed_experts_start_len": (0,),
    "sampling_logprobs_mode": (),
    "session_params": ({},),
    "stop_regex": ("", []),
    "stream_reasoning": (True,),
    "task": (),
    "thinking": (),
    "use_audio_in_video": (False,),
    "video_config": ({},),
    "watermark": ({},),
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
