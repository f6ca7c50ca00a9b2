"""The text part of a multimodal checkpoint: which model computes it, and what its weights are called there.

Images and sound are not served, so their towers are not loaded. With text alone every position is the same in each of
its dimensions, so a text part with multidimensional RoPE is computed by the text model that it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

from lorafleet.workers.checkpoint import text_config

KEYS: Mapping[str, str] = {
    r"^(model\.)?language_model\.(model\.)?(?!lm_head)": "model.",
    r"^(model\.)?language_model\.lm_head": "lm_head",
}
"""Patterns of weights' names in multimodal checkpoints -> their names in the text model."""


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
