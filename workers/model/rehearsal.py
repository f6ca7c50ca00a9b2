"""Probes a small float32 copy of a base on the CPU before the base itself is loaded.

The probe of the base itself allows for the rounding of its dtype, and is short. The copy has the base's architecture,
few layers, loud random weights, and windows that its probe is longer than; it must agree to float32's rounding.
"""

from __future__ import annotations

import copy
import logging
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.model.geometry import projection_groups
from lorafleet.workers.model.loader import base_of, refuse_recurrent
from lorafleet.workers.model.runner import ModelRunner

logger = logging.getLogger(__name__)

NUM_TOKENS = 40
MAX_LEN = 64
MIN_LEN = 16
"""A probe in two parts needs more tokens than the shortest length that may be served."""
WINDOW = 12
MIN_LAYERS = 4
SMALL: dict[str, int] = {
    "vocab_size": 320,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
"""Sizes that are lowered to this, in models that can be made so."""
NARROW: dict[str, int] = {**SMALL, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
"""The same for a copy that is narrower, too; `head_dim` stays."""
MAX_PARAMETERS = 64_000_000
"""A copy that has more parameters takes seconds; it is not made."""


def rehearse(config: PretrainedConfig, max_model_len: int) -> None:
    """Raise UnsupportedModel when a small copy of the base is not computed as transformers computes it."""
    reason = _why_not(config.to_json_string(use_diff=False), _Key(config), max_model_len)
    if reason is not None:
        raise UnsupportedModel(reason)


class _Key:
    """A configuration that is no part of a cache's key."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=64)
def _why_not(_digest: str, key: _Key, max_model_len: int) -> str | None:
    config = key.config
    try:
        for sizes in (NARROW, SMALL, {}):
            made = _copy(config, sizes, max_model_len)
            if made is not None:
                _probe(made, max(MIN_LEN, min(max_model_len, MAX_LEN)))
                return None
        logger.info("no small copy of %s can be made; it is probed as it is only", config.model_type)
    except UnsupportedModel as error:
        return str(error)
    return None


def small_config(config: PretrainedConfig, sizes: dict[str, int], max_model_len: int) -> PretrainedConfig:
    """The configuration with few layers, of each kind at least one, windows that are soon left, and small `sizes`."""
    small: Any = copy.deepcopy(config)
    num_layers = small.num_hidden_layers
    kinds = {name: value for name, value in vars(small).items() if isinstance(value, list) and len(value) == num_layers}
    kind_of = [tuple(repr(value[layer]) for value in kinds.values()) for layer in range(num_layers)]
    count = min(num_layers, max(MIN_LAYERS, 1 + max((kind_of.index(kind) for kind in set(kind_of)), default=0)))
    for name, value in kinds.items():
        setattr(small, name, value[:count])
    small.num_hidden_layers = count
    window = getattr(small, "sliding_window", None)
    if isinstance(window, int) and WINDOW < window < max_model_len:
        small.sliding_window = WINDOW
    is_grouped = getattr(small, "num_key_value_heads", None) != getattr(small, "num_attention_heads", None)
    for name, most in sizes.items():
        if isinstance(getattr(small, name, None), int):
            most = sizes["num_attention_heads"] if name == "num_key_value_heads" and not is_grouped else most
            setattr(small, name, min(getattr(small, name), most))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small


def _copy(config: PretrainedConfig, sizes: dict[str, int], max_model_len: int) -> PreTrainedModel | None:
    """A copy that transformers itself computes; None when there is none of a bearable size."""
    try:
        small = small_config(config, sizes, max_model_len)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(small)
        refuse_recurrent(empty)
        num_parameters = sum(value.numel() for value in empty.parameters())
        if num_parameters > MAX_PARAMETERS:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(1, NUM_TOKENS)[None], use_cache=False).logits
    except UnsupportedModel:
        raise
    except Exception:  # whatever a shrunken configuration does to a model, the base itself is still to be probed
        logger.debug("a small copy of %s cannot be computed", config.model_type, exc_info=True)
        return None
    return model if bool(logits.isfinite().all()) else None


def _probe(model: PreTrainedModel, max_model_len: int) -> None:
    num_tokens = min(NUM_TOKENS, max_model_len)
    base = base_of(model, model.config, "float32", max_model_len, num_tokens)
    linear = [name for name, shape in base.geometry.modules.items() if shape.kind == "linear"]
    layout = PoolLayout.of(base.geometry, projection_groups(linear), 1)
    cache = KVCache(base.layers, num_pages=8, page_tokens=16, dtype=torch.float32, device=base.device)
    pool = AdapterPool(layout, pool_bytes=0, max_slots=0, device=base.device)
    ModelRunner(base, cache, pool, max_pages=cache.pages_for(max_model_len + 1))
