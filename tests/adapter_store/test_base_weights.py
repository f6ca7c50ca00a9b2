"""The base's weights, wherever its checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from lorafleet.adapter_store.base_weights import CheckpointWeights, own_weight
from lorafleet.adapter_store.errors import SourceUnavailable
from lorafleet.adapter_store.manifest import BaseGeometry
from tests.support.bases import BaseKind


def assert_reads(weights: CheckpointWeights, module: str, expected: torch.Tensor) -> None:
    found = weights.read(module, "weight")
    assert found is not None
    torch.testing.assert_close(torch.from_numpy(found.array), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
def test_weights_of_the_model(
    base_of: Callable[[BaseKind], Path], tmp_path: Path, kind: BaseKind, max_shard_size: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_of(kind))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or max_shard_size == "60KB"
    weights = CheckpointWeights(tmp_path)
    name, embedding = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding))
    assert_reads(weights, name, embedding.weight.detach())
    if kind == "llama":
        assert_reads(weights, "lm_head", model.lm_head.weight.detach())
    else:
        assert weights.read("lm_head", "weight") is None
    assert weights.read("lm_head", "bias") is None


def test_a_weight_of_fewer_bits_is_not_at_hand(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert CheckpointWeights(tmp_path).read("lm_head", "weight") is None


def test_rows_of_a_weight(base_of: Callable[[BaseKind], Path]) -> None:
    weights = CheckpointWeights(base_of("llama"))
    whole, some = weights.read("lm_head", "weight"), weights.read("lm_head", "weight", (303, 0, 7))
    assert whole is not None
    assert some is not None
    np.testing.assert_array_equal(some.array, whole.array[[303, 0, 7]])
    vector = weights.read("model.norm", "weight", (5, 1))
    assert vector is not None
    assert vector.shape == (2,)
    assert weights.read("absent", "weight", (0,)) is None


def test_output_that_is_tied_has_the_matrix_of_the_embedding(base_of: Callable[[BaseKind], Path]) -> None:
    weights = CheckpointWeights(base_of("llama_tied"))
    geometry = BaseGeometry({}, "float32", tied={"lm_head": "model.embed_tokens"})
    own, embedding = own_weight(weights, geometry, "lm_head", "weight"), weights.read("model.embed_tokens", "weight")
    assert own is not None
    assert embedding is not None
    assert own.has_bits_of(embedding)
    assert own_weight(weights, BaseGeometry({}, "float32"), "lm_head", "weight") is None
    assert own_weight(weights, geometry, "lm_head", "bias") is None
    assert own_weight(None, geometry, "lm_head", "weight") is None


def test_checkpoint_of_a_bare_decoder(base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    (whole,) = base_of("gpt2").glob("*.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(whole).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_reads(CheckpointWeights(tmp_path), "transformer.wte", tensors["wte.weight"])


def test_checkpoint_in_another_format(tmp_path: Path) -> None:
    assert CheckpointWeights(tmp_path).read("lm_head", "weight") is None


def test_hub_that_cannot_be_reached_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    weights = CheckpointWeights("org/base")
    for _ in range(2):
        with pytest.raises(SourceUnavailable):
            weights.read("lm_head", "weight")


def test_names_that_transformers_renames_on_load(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    assert_reads(CheckpointWeights(tmp_path), "lm_head", model.get_parameter("lm_head.weight").detach())
