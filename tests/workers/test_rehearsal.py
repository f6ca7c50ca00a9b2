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

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.workers.checkpoint import read_config
from lorafleet.workers.config import EngineConfig, ModelConfig
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.model import rehearsal
from lorafleet.workers.model.geometry import NORMS
from lorafleet.workers.model.rehearsal import NARROW, rehearse, small_config
from lorafleet.workers.model_parts import served_geometry
from tests.support.adapters import make_adapter
from tests.workers.harness import Shelf, ask, assert_pefts, greedy, open_worker, random_prompt


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
@pytest.mark.parametrize(
    ("oddity", "kinds"), [("order", {"down_proj"}), pytest.param("norm", {NORMS}, marks=pytest.mark.slow)]
)
async def test_adapters_alone_are_refused_where_they_alone_are_wrong(
    oddity: str, kinds: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The base and adapters on other modules are served; the refusal names the module."""
    monkeypatch.setattr(rehearsal, "NARROW", {**NARROW, "num_hidden_layers": 2})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 304}
    config = OddConfig(oddity=oddity, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    assert rehearse(config, 64) == kinds
    assert f"without adapters on {', '.join(kinds)}" in caplog.text
    assert rehearse(config, 64) == kinds  # kept
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model, engine = ModelConfig(id="base", source=str(tmp_path / "base")), EngineConfig(device="cpu")
    geometry = served_geometry(model, engine, "cpu")
    assert bool(geometry.vectors) == (NORMS not in kinds)
    reader = AdapterReader(geometry, 8)
    saved: dict[str, Any] = {
        "down_proj": {"target_modules": ["q_proj", "down_proj"]},
        NORMS: {"modules_to_save": ["norm"]},
    }
    (kind,) = kinds
    bad = make_adapter(tmp_path / "bad", tmp_path / "base", "rank4_qv", **saved[kind])
    with pytest.raises(AdapterRefused, match="down_proj" if kind == "down_proj" else "norm"):
        reader.read(bad)
    shelf = Shelf(tmp_path / "base")
    version = shelf.put(make_adapter(tmp_path / "good", shelf.base, "rank4_qv"))
    prompt = random_prompt(20, 1)
    async with open_worker(shelf) as worker:
        for each in (None, version):
            answer = await ask(worker, prompt, each, greedy(8, logprobs=0, prompt_logprobs=True))
            assert_pefts(shelf, each, prompt, answer, 1e-4)


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

    def find(config: object, length: int, *, compresses: bool) -> rehearsal.Finding:
        tried.append(length)
        return rehearsal.Finding()

    monkeypatch.setattr(rehearsal, "_find", find)
    rehearse(good, 512)
    with pytest.raises(UnsupportedModel, match="its own mask"):
        rehearse(bad, 512)
    assert tried == []
    rehearse(good, 256)
    assert tried == [256]
    rehearse(good, 256, compresses=True)
    assert tried.pop() == 256
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
