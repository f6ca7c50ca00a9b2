"""A small float32 copy of a base shows what the rounding of its own dtype, or a short probe, would hide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lorafleet.workers.checkpoint import read_config
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.model import rehearsal
from lorafleet.workers.model.rehearsal import NARROW, rehearse, small_config


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody has rehearsed here yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("doge", "its own mask"),
        ("jamba", "recurrent state"),
        ("deepseek_v32", "hands attention indices"),
        ("zaya", r"qkv_proj \(ZayaCCAProjection\) .* when a prompt comes in parts"),
    ],
)
def test_a_base_of_full_size_is_refused_before_its_weights_are_read(kind: str, reason: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    with pytest.raises(UnsupportedModel, match=reason):
        rehearse(AutoConfig.for_model(kind), 8192)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text", "qwen2_moe", "gpt2"])
@pytest.mark.slow
def test_a_base_of_full_size_that_is_served(kind: str) -> None:
    rehearse(AutoConfig.for_model(kind), 8192)


class OddMLP(LlamaMLP):  # type: ignore[misc]
    """One that nobody has tried."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if self.config.oddity == "mean":  # of the rows of a forward pass
            return y + x.mean(dim=1, keepdim=True).roll(1, dims=-1)
        if self.config.oddity == "order":  # rows are in another order where the adapter acts
            y = self.down_proj(self.act_fn(self.gate_proj(x)).flip(1)).flip(1)
        if self.config.oddity == "norm":  # it is not called, so no substitute for it acts
            y = y * self.norm.weight
        return y


class OddConfig(LlamaConfig):  # type: ignore[misc]
    model_type = "odd"
    oddity: str = ""


class OddForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    config_class = OddConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OddMLP(config)
            layer.mlp.__dict__["norm"] = layer.post_attention_layernorm


@pytest.fixture
def odd() -> Iterator[None]:
    AutoConfig.register("odd", OddConfig, exist_ok=True)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)
    yield
    AutoModelForCausalLM._model_mapping._extra_content.pop(OddConfig)


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize(
    ("oddity", "reason"),
    [
        ("mean", r"model\.layers\.0\.mlp \(OddMLP\) computes something else .* when a prompt comes in parts"),
        ("order", r"model\.layers\.0\.mlp \(OddMLP\) computes something else .* with others and their adapters"),
        ("norm", r"model\.layers\.0\.mlp \(OddMLP\) computes something else .* with others and their adapters"),
    ],
)
@pytest.mark.slow
def test_what_is_wrong_with_a_base_that_nobody_has_tried_is_found(
    oddity: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "NARROW", {**NARROW, "num_hidden_layers": 2})
    config = OddConfig(oddity=oddity, num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match=reason):
        rehearse(config, 512)


@pytest.mark.usefixtures("odd")
def test_what_is_only_computed_by_other_modules_is_served() -> None:
    rehearse(OddConfig(num_hidden_layers=2), 512)


def test_a_copy_has_a_layer_of_every_kind_and_limits_that_its_prompts_leave() -> None:
    config = AutoConfig.for_model("gemma3_text")
    small = small_config(config, NARROW, 8192)
    assert set(small.layer_types) == set(config.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) < config.num_hidden_layers
    assert small.sliding_window == 12
    assert small_config(config, NARROW, 512).sliding_window == config.sliding_window
    assert config.hidden_size > small.hidden_size == 64
    llama4 = small_config(AutoConfig.for_model("llama4_text"), NARROW, 2**17)
    assert (llama4.attention_chunk_size, llama4.floor_scale) == (12, 12)


def test_a_base_is_rehearsed_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the code, its configuration and its length are the same."""
    good, bad = AutoConfig.for_model("llama"), AutoConfig.for_model("doge")
    rehearse(good, 512)
    with pytest.raises(UnsupportedModel, match="its own mask"):
        rehearse(bad, 512)
    tried = []
    monkeypatch.setattr(rehearsal, "_why_not", lambda config, length: tried.append(length))
    rehearse(good, 512)
    with pytest.raises(UnsupportedModel, match="its own mask"):
        rehearse(bad, 512)
    assert tried == []
    rehearse(good, 256)
    assert tried == [256]
    for kept in (home / rehearsal.FOLDER).iterdir():
        kept.write_text("{")
    rehearse(good, 512)
    assert tried == [256, 512]
    # Where nothing can be kept it is rehearsed each time.
    monkeypatch.setenv("HOME", "/dev/null")
    rehearse(good, 512)
    assert tried == [256, 512, 512]


def test_a_quantised_base_is_refused_by_the_name_of_its_method(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("quantised")
    config = AutoConfig.for_model("llama")
    config.quantization_config = {"quant_method": "hqq"}
    config.save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="quantised by hqq, which is not supported"):
        read_config(ModelConfig(id="base", source=str(folder)))


def test_random_weights_of_a_copy_leave_the_process_s_own_draws_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    rehearse(AutoConfig.for_model("qwen3"), 512)
    assert torch.rand(1) == expected
