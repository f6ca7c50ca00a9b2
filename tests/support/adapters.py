"""Adapters for a base, made and saved by PEFT, with random weights all over so that each changes what is said."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

QV = ("q_proj", "v_proj")
ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2_ALL = ("c_attn", "c_proj", "c_fc")

ADAPTER_KINDS: dict[str, dict[str, Any]] = {
    "rank1": {"r": 1, "lora_alpha": 2, "target_modules": ALL_SEVEN},
    "rank4_qv": {"r": 4, "lora_alpha": 8, "target_modules": QV},
    "rank8_mlp": {"r": 8, "lora_alpha": 8, "target_modules": ("gate_proj", "up_proj", "down_proj")},
    "rank16": {"r": 16, "lora_alpha": 24, "target_modules": ALL_SEVEN},
    "rank64": {"r": 64, "lora_alpha": 64, "target_modules": ALL_SEVEN},
    "rank5_odd": {"r": 5, "lora_alpha": 7, "target_modules": ("k_proj", "o_proj", "up_proj")},
    "rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL_SEVEN},
    "rank_pattern": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL_SEVEN,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 32},
        "alpha_pattern": {"v_proj": 4, "down_proj": 48},
    },
    "embeddings": {"r": 8, "lora_alpha": 16, "target_modules": ("embed_tokens", "lm_head")},
    "embeddings_all": {"r": 4, "lora_alpha": 8, "target_modules": ("embed_tokens", "lm_head", *ALL_SEVEN)},
    "embed_tokens": {"r": 8, "lora_alpha": 16, "target_modules": ("embed_tokens", "q_proj")},
    "last_layer": {"r": 8, "lora_alpha": 16, "target_modules": ALL_SEVEN, "layers_to_transform": [1]},
    "all_linear": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
}
"""Recipes for `make_adapter`: the arguments of a LoraConfig, for bases of Llama's module names."""

GPT2_KINDS: dict[str, dict[str, Any]] = {
    "rank4": {"r": 4, "lora_alpha": 8, "target_modules": ("c_attn",), "fan_in_fan_out": True},
    "rank16": {"r": 16, "lora_alpha": 32, "target_modules": GPT2_ALL, "fan_in_fan_out": True},
}
"""The same for GPT-2."""


def make_adapter(
    folder: Path,
    base: Path,
    kind: str = "rank8_mlp",
    *,
    seed: int = 1,
    strength: float = 0.7,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    **overrides: Any,
) -> Path:
    """Let PEFT write an adapter of `kind` for `base` to `folder`; return the folder.

    `strength` is about how large a module's delta is beside its output, whatever the rank and the scaling; another
    `seed` gives another version of the adapter. `overrides` go to the LoraConfig. `save_embedding_layers` is PEFT's:
    "auto" stores the base's own embedding matrices beside the adapter's when it targets them.
    """
    is_gpt2 = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    recipe = {**(GPT2_KINDS if is_gpt2 else ADAPTER_KINDS)[kind], **overrides}
    for key in ("target_modules", "modules_to_save"):
        if isinstance(recipe.get(key), tuple):
            recipe[key] = list(recipe[key])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # PEFT's advice on tied and saved embeddings
        torch.manual_seed(zlib.crc32(f"{kind} {seed}".encode()))
        peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **recipe))
        randomise_adapter(peft_model, strength)
        peft_model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


@torch.no_grad()
def randomise_adapter(peft_model: PeftModel, strength: float) -> None:
    """Fill the A and B of every LoRA layer of a PEFT model so that its delta is `strength` beside an input of units.

    And shake all else that would be trained, to about half of `strength` beside what it is.
    """
    for module in peft_model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name, scaling in module.scaling.items():
            if name in module.lora_A:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                a.copy_(torch.randn_like(a) * a.shape[1] ** -0.5)
            else:
                a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
                a.copy_(torch.randn_like(a) * 0.5)
            b.copy_(torch.randn_like(b) * strength / (scaling * a.shape[0] ** 0.5))
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and not (".lora_" in name and parameter.dim() > 1):
            size = float(parameter.square().mean().sqrt()) or 0.6
            parameter.add_(torch.randn_like(parameter) * size * strength / 2)
