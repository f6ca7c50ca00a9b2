"""Adapters that PEFT makes, with random weights that change what is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM


def write_peft_adapters(
    base: Path,
    root: Path,
    recipes: Mapping[str, Mapping[str, Any]],
    fill: Callable[[LoraLayer], None],
    **save: Any,
) -> dict[str, Path]:
    """Name -> folder of an adapter that its recipe, fields of LoraConfig, describes. `fill` draws a layer's weights."""
    folders = {}
    for number, (name, recipe) in enumerate(recipes.items()):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, **recipe))
        with torch.no_grad():
            for module in peft_model.modules():
                if isinstance(module, LoraLayer):
                    fill(module)
        folders[name] = root / name
        peft_model.save_pretrained(folders[name], **save)
    return folders
