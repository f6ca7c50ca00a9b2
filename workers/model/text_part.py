"""The text part of a multimodal checkpoint: which model computes it, and what its weights are called there.

Images and sound are not served, so their towers are not loaded. With text alone every position is the same in each of
its dimensions, so a text part with multidimensional RoPE is computed by the text model that it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PretrainedConfig

KEYS: Mapping[str, str] = {
    r"^(model\.)?language_model\.(model\.)?(?!lm_head)": "model.",
    r"^(model\.)?language_model\.lm_head": "lm_head",
}
"""Patterns of weights' names in multimodal checkpoints -> their names in the text model."""

MADE_FROM: Mapping[str, str] = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""`model_type` of a text part with multidimensional RoPE -> that of the text model."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text part; a text model's own is returned as it is."""
    if "text_config" not in config.sub_configs:
        return config
    text: PretrainedConfig = config.get_text_config(decoder=True)
    if text is config:
        return config
    twin = MADE_FROM.get(text.model_type)
    if twin is not None:
        cls: Any = CONFIG_MAPPING[twin]
        fields = {name: value for name, value in vars(text).items() if name in cls.__dataclass_fields__}
        for name in ("architectures", "model_type", "transformers_version"):
            fields.pop(name, None)
        rope = {name: value for name, value in text.rope_parameters.items() if not name.startswith("mrope")}
        text = cls(**{**fields, "rope_parameters": rope})
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def whole_names(config: PretrainedConfig) -> tuple[dict[str, str], frozenset[str]]:
    """Names of the text part's modules -> those in the whole model, and the modules of the whole that are not in it.

    `config`: the checkpoint's. Both are empty for a text model, and where transformers cannot make the whole one.
    """
    if text_config(config) is config:
        return {}, frozenset()
    try:
        with torch.device("meta"):
            whole = AutoModelForImageTextToText.from_config(config)
    except (ValueError, ImportError, TypeError, AttributeError):
        return {}, frozenset()
    names: dict[str, str] = {}
    others = set()
    for name, module in whole.named_modules():
        text = name
        for pattern, new in KEYS.items():
            text = re.sub(pattern, new, text)
        if text != name:
            names[text] = name
        elif any(True for _ in module.parameters(recurse=False)) and module is not whole.get_output_embeddings():
            others.add(name)
    return names, frozenset(others)
