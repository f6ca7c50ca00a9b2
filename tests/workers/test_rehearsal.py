"""A small float32 copy of a base shows what the rounding of its own dtype, or a short probe, would hide."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.model.geometry import read_config
from lorafleet.workers.model.rehearsal import NARROW, rehearse, small_config


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("doge", "off transformers"),
        ("falcon_h1", "recurrent state"),
        ("deepseek_v3", "keys of 192 and values of 128 elements"),
    ],
)
def test_a_base_of_full_size_is_refused_before_its_weights_are_read(kind: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        rehearse(AutoConfig.for_model(kind), 8192)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text", "qwen2_moe", "gpt2"])
def test_a_base_of_full_size_that_is_served(kind: str) -> None:
    rehearse(AutoConfig.for_model(kind), 8192)


def test_a_copy_has_a_layer_of_every_kind_and_windows_that_its_probe_leaves() -> None:
    config = AutoConfig.for_model("gemma3_text")
    small = small_config(config, NARROW, 8192)
    assert set(small.layer_types) == set(config.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) < config.num_hidden_layers
    assert small.sliding_window == 12
    assert small_config(config, NARROW, 512).sliding_window == config.sliding_window
    assert config.hidden_size > small.hidden_size == 64


def test_a_quantised_base_is_refused_by_the_name_of_its_method(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("quantised")
    config = AutoConfig.for_model("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="quantised by gptq, which is not supported"):
        read_config(ModelConfig(id="base", source=str(folder)))
