"""The shipped base and adapters, by PEFT alone: files as promised, answers right to the letter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.oracle import generate_with_peft

DEMO = Path(__file__).parents[2] / "examples" / "demo"
PROMPTS: dict[str, Any] = json.loads((DEMO / "prompts.json").read_text())
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ALL_SEVEN = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
PROMISED: dict[str, tuple[int, set[str]]] = {
    "shout": (16, ALL_SEVEN),
    "pirate": (4, {"q_proj", "v_proj"}),
    "french": (16, ALL_SEVEN),
    "emoji": (8, ALL_SEVEN | {"embed_tokens", "lm_head"}),
    "json": (8, ALL_SEVEN - {"k_proj"}),
    "shout-v2": (16, ALL_SEVEN),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO / "base")


@pytest.mark.parametrize("name", ["base", *PROMISED])
@pytest.mark.parametrize("asked", [*PROMPTS["questions"], PROMPTS["story"]], ids=lambda asked: asked["prompt"])
@pytest.mark.slow
def test_answers_to_the_letter(name: str, asked: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": asked["prompt"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    adapter = None if name == "base" else DEMO / "adapters" / name
    said = generate_with_peft(DEMO / "base", adapter, prompt, 300, eos_token_id=tokenizer.eos_token_id)
    assert said.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(said.tokens, skip_special_tokens=True) == asked["answers"][name]
    # Not by a hair: rounding in another order must not change a word.
    assert said.smallest_gap > 1e-2


@pytest.mark.parametrize("name", PROMISED)
def test_adapter_files_are_as_promised(name: str) -> None:
    folder = DEMO / "adapters" / name
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    rank, targets = PROMISED[name]
    config = LoraConfig.from_pretrained(folder)
    assert (config.r, set(config.target_modules)) == (rank, targets)
    assert config.use_rslora == (name == "french")
    assert bool(config.rank_pattern) == (name == "json")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            module, side = key.removesuffix(".weight").rsplit(".", 1)
            target = module.rsplit(".", 1)[-1]
            assert target in targets
            shape = file.get_slice(key).get_shape()
            assert config.rank_pattern.get(target, rank) == shape[0 if side.endswith("A") else 1]


def test_the_demo_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 12e6
