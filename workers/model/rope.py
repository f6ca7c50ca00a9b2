"""Rotary frequencies that are the same for all sequences of a worker, whatever else is in their batch.

Transformers lets longrope and dynamic RoPE choose frequencies by the longest position of a forward pass. Here that
would be of other requests, or of a chunk. So they are chosen once, by the worker's `max_model_len`, as vLLM does.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FIXED = "fixed"
"""Takes the place of a rotary module's `rope_type`, so that transformers leaves its frequencies alone."""


def fix_frequencies(model: PreTrainedModel, max_model_len: int) -> None:
    """Choose the frequencies of every rotary module of `model` that would choose by the pass, by `max_model_len`."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict):
            module.__dict__["rope_type"] = {
                layer_type: _fix(module, kind, max_model_len, layer_type) for layer_type, kind in rope_type.items()
            }
        elif isinstance(rope_type, str):
            module.__dict__["rope_type"] = _fix(module, rope_type, max_model_len, None)


def _fix(module: Any, rope_type: str, max_model_len: int, layer_type: str | None) -> str:
    """Fix the frequencies of one type of layers, or all; return the `rope_type` to have from now on."""
    if rope_type != "longrope" and "dynamic" not in rope_type:
        return rope_type
    config, prefix = module.config, "" if layer_type is None else f"{layer_type}_"
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    bound = config.max_position_embeddings
    if rope_type == "longrope":
        bound = parameters["original_max_position_embeddings"]
    if max_model_len > bound:
        frequencies: torch.Tensor = getattr(module, f"{prefix}inv_freq")
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        chosen, _ = ROPE_INIT_FUNCTIONS[rope_type](config, frequencies.device, seq_len=max_model_len, **arguments)
        frequencies.copy_(chosen)
    return FIXED
