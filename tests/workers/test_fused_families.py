"""Layers of many families are computed by fused kernels, and look-alikes are not; all answer as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.memory.state_store import StateStore
from lorafleet.workers.model import rehearsal
from lorafleet.workers.model.geometry import projection_groups
from lorafleet.workers.model.loader import base_of
from lorafleet.workers.model.probe import Piece, answer
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model.startup import start_runner
from tests.workers.harness import random_prompt
from tests.workers.test_refusals import DEEPSEEK, LLAMA4, SHAPE, save_base

WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": {**WINDOWS, "head_dim": 8},
    "exaone4": WINDOWS,
    "gemma": {"head_dim": 8},
    "gemma2": {**WINDOWS, "head_dim": 8},
    "gemma3_text": {**WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8},
    "glm": {"head_dim": 8, "pad_token_id": 0},
    "glm4": {"head_dim": 8, "pad_token_id": 0},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "mistral": {"sliding_window": 12},
    "ministral": {**WINDOWS, "head_dim": 8},
    "olmo2": {"pad_token_id": 0},
    "olmo3": {**WINDOWS, "pad_token_id": 0},
    "phi3": {"pad_token_id": 0, "partial_rotary_factor": 0.5},
    "qwen2": {},
    "smollm3": {"pad_token_id": 0, "no_rope_layers": [1, 0]},
    "gpt_oss": {**WINDOWS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
QUICK = {"cohere2", "gemma3_text", "glm4", "granite", "olmo2", "phi3", "smollm3", "gpt_oss"}
IN_PART: dict[str, dict[str, Any]] = {
    "deepseek_v2": DEEPSEEK,
    "llama4_text": LLAMA4 | {"num_local_experts": 3, "attention_chunk_size": 64},
}
"""Attention of these is transformers'."""


def rehearsed(model: PreTrainedModel) -> ModelRunner:
    """The runner of a base whose answers have been compared with transformers', its adapters among them."""
    done = rehearsal._Rehearsal(model.eval(), rehearsal.MAX_LEN)
    done.run()
    return done.runner


def loud(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A tiny model with random weights, its norms' too."""
    config = AutoConfig.for_model(kind, **{**SHAPE, **settings})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_a_family_is_fused_and_right(kind: str) -> None:
    assert rehearsed(loud(kind, FAMILIES[kind])).layers == "fused"


@pytest.mark.parametrize("kind", IN_PART)
@pytest.mark.slow
def test_what_is_not_recognised_stays_transformers(kind: str) -> None:
    assert rehearsed(loud(kind, IN_PART[kind])).layers == "in part"


class ByPosition(LlamaAttention):  # type: ignore[misc]
    """Queries of far positions are larger."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **rest: Any) -> Any:
        return super().forward(hidden_states * (1 + (position_ids >= 60)[..., None]), **rest)


class Remembering(LlamaAttention):  # type: ignore[misc]
    """Its values are larger."""

    def forward(self, hidden_states: Tensor, **rest: Any) -> Any:
        out, weights = super().forward(hidden_states, **rest)
        return out * 1.01, weights


class Squared(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) ** 2)
        return y


class Shifted(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + 0.01
        return y


class Skipping(LlamaDecoderLayer):  # type: ignore[misc]
    """The MLP reads the layer's input."""

    def forward(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        y: Tensor = super().forward(hidden_states, **rest) + self.post_attention_layernorm(hidden_states)
        return y


@pytest.mark.parametrize(
    ("place", "odd"),
    [
        ("self_attn", ByPosition),
        ("self_attn", Remembering),
        ("mlp", Squared),
        ("input_layernorm", Shifted),
        ("", Skipping),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_look_alikes_are_not_recognised(place: str, odd: type[nn.Module]) -> None:
    model = loud("llama", {"num_hidden_layers": 3})
    layer: Any = model.model.layers[1]
    layer.get_submodule(place).__class__ = odd
    runner = rehearsed(model)
    found = runner.base.model.model.layers[1]
    assert "forward" not in found.get_submodule(place).__dict__
    assert "forward" in runner.base.model.model.layers[0].__dict__


def started(model: PreTrainedModel) -> ModelRunner:
    """The runner of a bfloat16 base, without a probe."""
    base = base_of(model, model.config, "bfloat16", rehearsal.MAX_LEN, 40)
    cache = KVCache(base.layers, num_pages=16, page_tokens=16, dtype=torch.bfloat16, device=base.device)
    linear = [name for name, shape in base.geometry.modules.items() if shape.kind == "linear"]
    layout = PoolLayout.of(base.geometry, projection_groups(linear), 2)
    pool = AdapterPool(layout, pool_bytes=32 << 20, max_slots=2, device=base.device)
    states = StateStore(base.states, num_slots=1, device=base.device)
    return start_runner(base, cache, pool, states, max_pages=cache.pages_for(rehearsal.MAX_LEN + 1), is_probed=False)


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_bfloat16_is_fused_whatever_dtype_angles_have(kind: str) -> None:
    assert started(loud(kind, FAMILIES.get(kind, {})).bfloat16()).layers == "fused"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*FAMILIES, *IN_PART])
@torch.no_grad()
def test_in_bfloat16_on_a_gpu_a_family_rounds_as_transformers(kind: str, tmp_path: Path) -> None:
    """Logprobs are off float64 by at most 1.3 x what transformers' own in bfloat16 are off."""
    wider = {"hidden_size": 256, "intermediate_size": 512}
    wider |= {} if kind in IN_PART else {"head_dim": 64}
    base = save_base(tmp_path, kind, {**SHAPE, **FAMILIES.get(kind, {}), **IN_PART.get(kind, {}), **wider})
    tokens = list(random_prompt(40, 1))

    def own(dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager").cuda().eval()

    def logprobs(model: PreTrainedModel) -> Tensor:
        logits: Tensor = model(input_ids=torch.tensor([tokens], device="cuda"), use_cache=False).logits[0]
        return logits.double().log_softmax(-1)

    double = own(torch.float64)
    double.set_experts_implementation("eager")
    exact, rounded = logprobs(double), logprobs(own(torch.bfloat16))
    runner = started(own(torch.bfloat16))
    assert runner.layers == ("in part" if kind in IN_PART else "fused")
    pages, state = runner.cache.allocate(runner.cache.pages_for(len(tokens))), runner.states.acquire()
    steps = [[Piece(tokens, start, end, pages, state)] for start, end in ((0, 23), (23, 24), (24, 40))]
    found = torch.cat(answer(runner, steps)).double().log_softmax(-1)
    error, their_error = float((found - exact).norm()), float((rounded - exact).norm())
    assert error <= 1.3 * their_error + 1e-3, (error, their_error)
