"""Which norms of a base an adapter may replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, PretrainedConfig, StableLmConfig

from lorafleet.workers.config import ModelConfig
from lorafleet.workers.model.geometry import empty_model, geometry_of, read_geometry
from tests.support.bases import BaseKind

LAYER = ("input_layernorm.weight", "post_attention_layernorm.weight")
HEADS = ("self_attn.k_norm.weight", "self_attn.q_norm.weight")
LAYER_NORMS = tuple(f"ln_{number}.{name}" for number in (1, 2) for name in ("bias", "weight"))


@pytest.mark.parametrize(
    ("kind", "layers", "per_layer", "others"),
    [
        ("llama", "model.layers", LAYER, {"model.norm.weight": 64}),
        ("qwen2", "model.layers", LAYER, {"model.norm.weight": 64}),
        ("qwen3", "model.layers", (*LAYER, *HEADS), {"model.norm.weight": 64}),
        ("gpt2", "transformer.h", LAYER_NORMS, {"transformer.ln_f.weight": 64, "transformer.ln_f.bias": 64}),
    ],
)
def test_norms_of_the_hidden_state(
    kind: BaseKind,
    layers: str,
    per_layer: tuple[str, ...],
    others: dict[str, int],
    base_of: Callable[[BaseKind], Path],
) -> None:
    geometry = read_geometry(ModelConfig(id="base", source=str(base_of(kind))), "cpu")
    expected = {f"{layers}.{layer}.{name}": 32 if name in HEADS else 64 for layer in range(2) for name in per_layer}
    assert geometry.vectors == expected | others


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(hidden_size=64, head_dim=16, num_hidden_layers=1, vocab_size=100),
        StableLmConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, qk_layernorm=True, vocab_size=100),
    ],
    ids=["gemma3", "stablelm"],
)
def test_norms_of_heads_that_come_before_rows_are_left_out(config: PretrainedConfig) -> None:
    vectors = geometry_of(empty_model(config, torch.bfloat16), "bfloat16").vectors
    assert "model.norm.weight" in vectors
    assert not [name for name in vectors if "self_attn" in name]
