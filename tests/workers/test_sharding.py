"""How a base is cut for ranks, and what a rank loads of it: against transformers' whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig, Phi3Config, PretrainedConfig

from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.memory.shares import Share
from lorafleet.workers.model.geometry import empty_model, geometry_of
from lorafleet.workers.model.part_loader import load_part
from lorafleet.workers.model.sharding import shares_of
from lorafleet.workers.ranks import Ranks
from tests.support.bases import BaseKind, make_base
from tests.workers.test_refusals import DEEPSEEK, LLAMA4, SHAPE, save_base

CPU = torch.device("cpu")
GLM = {
    **SHAPE,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
}


def shares_on(config: PretrainedConfig, rank: int, size: int) -> dict[str, Share]:
    empty = empty_model(config, torch.float32)
    return shares_of(empty, geometry_of(empty, "float32"), Ranks(rank, size))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "qwen3", "mistral"])
def test_parts_of_all_ranks_are_the_base(base_of: Callable[[BaseKind], Path], kind: BaseKind, size: int) -> None:
    """Every parameter is the checkpoint's own, cut along one dimension or whole; heads may be on several ranks."""
    base = base_of(kind)
    config = AutoConfig.from_pretrained(base)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = ModelConfig(id="base", source=str(base))
    parts = [load_part(model, config, torch.float32, CPU, shares_on(config, rank, size)) for rank in range(size)]
    for name, expected in whole.state_dict().items():
        found = [part.get_parameter(name) for part in parts]
        if found[0].shape == expected.shape:
            assert all(torch.equal(each, expected) for each in found), name
            assert "norm" in name or name.endswith("o_proj.bias"), name
            continue
        dim = next(d for d, (a, b) in enumerate(zip(found[0].shape, expected.shape, strict=True)) if a != b)
        copies = size * found[0].shape[dim] // expected.shape[dim]
        assert copies == (size // 2 if ".k_proj." in name or ".v_proj." in name else 1), name
        assert torch.equal(torch.cat(found[::copies], dim), expected), name
        for first in range(0, size, copies):
            assert all(torch.equal(found[first], each) for each in found[first : first + copies]), name
    if config.tie_word_embeddings:
        assert all(part.lm_head.weight is part.model.embed_tokens.weight for part in parts)
    buffers = dict(whole.named_buffers())
    for part in parts:
        assert all(torch.equal(value, buffers[name]) for name, value in part.named_buffers())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "olmoe", "phimoe"])
def test_each_rank_has_its_experts(kind: str, tmp_path: Path) -> None:
    """Whether the checkpoint has a tensor for each expert or one for all; what nobody cuts is whole."""
    base = save_base(tmp_path, kind, {**SHAPE, "num_local_experts": 4, "num_experts": 4, "pad_token_id": 0})
    config = AutoConfig.from_pretrained(base)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = ModelConfig(id="base", source=str(base))
    parts = [load_part(model, config, torch.float32, CPU, shares_on(config, rank, 2)) for rank in range(2)]
    seen = 0
    for name, expected in whole.named_parameters():
        found = [part.get_parameter(name) for part in parts]
        if ".experts." in name:
            assert torch.equal(torch.cat(found), expected), name
            assert found[0].shape[0] == 2
            seen += 1
        elif kind != "mixtral" and ".self_attn." in name:
            assert all(torch.equal(each, expected) for each in found), name
    assert seen == (8 if kind == "gpt_oss" else 4)


def test_dummies_are_equal_where_parts_are(base_of: Callable[[BaseKind], Path]) -> None:
    base = base_of("llama")
    config = AutoConfig.from_pretrained(base)
    config.initializer_range = 0.01
    model = ModelConfig(id="base", source=str(base), load="dummy")
    parts = [load_part(model, config, torch.float32, CPU, shares_on(config, rank, 4)) for rank in range(4)]
    key = "model.layers.0.self_attn.k_proj.weight"
    keys = [part.get_parameter(key) for part in parts]
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[1], keys[2])
    queries = [part.get_parameter("model.layers.0.self_attn.q_proj.weight") for part in parts]
    assert not torch.equal(queries[0], queries[1])
    assert 0.009 < float(queries[0].std()) < 0.011
    assert (parts[0].get_parameter("model.norm.weight") == 1).all()


SMALL = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 1, "vocab_size": 96, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (LlamaConfig(**SMALL, num_attention_heads=6), 4, "the 6 heads of model.layers.0.self_attn.q_proj"),
        (
            LlamaConfig(**SMALL, num_attention_heads=12, num_key_value_heads=3),
            4,
            "the 3 heads of model.layers.0.self_attn.k_proj",
        ),
        (
            LlamaConfig(**{**SMALL, "vocab_size": 97}, num_attention_heads=4),
            2,
            "the 97 tokens of model.embed_tokens",
        ),
        (
            LlamaConfig(**{**SMALL, "intermediate_size": 70}, num_attention_heads=4),
            4,
            "the 70 outputs of model.layers.0.mlp.gate_proj",
        ),
        (
            MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4, num_local_experts=5),
            4,
            "the 5 experts of model.layers.0.mlp.experts",
        ),
    ],
    ids=["heads", "kv-heads", "vocabulary", "intermediate", "experts"],
)
def test_uneven_sizes_are_refused(config: PretrainedConfig, size: int, message: str) -> None:
    with pytest.raises(WorkerConfigError, match=f"tensor_parallel_size: {size} ranks cannot share {message} evenly"):
        shares_on(config, 0, size)


def test_bases_that_cannot_be_cut_are_refused_by_name(base_of: Callable[[BaseKind], Path]) -> None:
    gpt2 = AutoConfig.from_pretrained(base_of("gpt2"))
    with pytest.raises(UnsupportedModel, match="no plan of tensor parallelism for gpt2"):
        shares_on(gpt2, 0, 2)
    assert shares_on(gpt2, 0, 1) == {}
    with pytest.raises(UnsupportedModel, match=r"phi3 cannot be cut .*'colwise_gather_output' for model\.layers\.0\."):
        shares_on(Phi3Config(**SMALL, num_attention_heads=4), 0, 2)
    with pytest.raises(UnsupportedModel, match=r"llama4_text has experts that all compute all rows"):
        shares_on(AutoConfig.for_model("llama4_text", **LLAMA4), 0, 2)


def test_a_checkpoint_that_lacks_weights_is_refused(base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(base_of("llama"))
    config.save_pretrained(tmp_path)
    model = ModelConfig(id="base", source=str(tmp_path))
    with pytest.raises(UnsupportedModel, match="no weights in safetensors files"):
        load_part(model, config, torch.float32, CPU, shares_on(config, 0, 2))
    other = ModelConfig(id="base", source=str(base_of("qwen2")))
    with pytest.raises(UnsupportedModel, match=r"lacks the weights|other shapes"):
        load_part(other, config, torch.float32, CPU, shares_on(config, 0, 2))


@pytest.mark.parametrize(
    ("kind", "settings"), [("deepseek_v3", {**DEEPSEEK, "first_k_dense_replace": 1}), ("glm4_moe", GLM)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_buffers_are_the_checkpoints(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", kind, settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trained = {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert trained
    for value in trained.values():
        value.copy_(torch.linspace(-1.01, 3.3, value.numel()))
    model.save_pretrained(base)
    config = AutoConfig.from_pretrained(base)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for rank in range(2):
        part = load_part(ModelConfig(id="base", source=str(base)), config, dtype, CPU, shares_on(config, rank, 2))
        for name in trained:
            found, expected = part.get_buffer(name), whole.get_buffer(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("stored", ["only the head", "both alike", "both"])
def test_a_tied_base_whose_checkpoint_has_a_head(stored: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama_tied")
    path = base / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    if stored == "only the head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head + (stored == "both")}, path, {"format": "pt"})
    config, model = AutoConfig.from_pretrained(base), ModelConfig(id="base", source=str(base))
    if stored == "both":
        with pytest.raises(UnsupportedModel, match=r"has a lm_head.weight of its own, though its config.json ties it"):
            load_part(model, config, torch.float32, CPU, shares_on(config, 0, 2))
        return
    parts = [load_part(model, config, torch.float32, CPU, shares_on(config, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([part.lm_head.weight for part in parts]), head)
    assert all(part.lm_head.weight is part.model.embed_tokens.weight for part in parts)
