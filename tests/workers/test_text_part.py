"""Multimodal checkpoints serve their text, with adapters that were trained on the whole model."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from lorafleet.workers.checkpoint import read_config
from lorafleet.workers.config import ModelConfig
from tests.support.adapters import randomise_adapter
from tests.support.bases import make_tokenizer
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt
from tests.workers.test_refusals import SHAPE

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **SHAPE},
        "vision_config": {"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **SHAPE, "head_dim": 8, "sliding_window": 8},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **SHAPE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "intermediate_size": 32,
        },
        "tie_word_embeddings": True,
    },
}


def save(folder: Path, kind: str) -> PreTrainedModel:
    """A whole multimodal model with loud random weights, saved as its authors would."""
    config = AutoConfig.for_model(kind, **MULTIMODAL[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


TARGETS: dict[str, Any] = {
    "llava": "all-linear",
    "gemma3": r".*language_model.*\.(k_proj|o_proj)",
    "qwen2_5_vl": ["model.language_model.layers.0.self_attn.q_proj", "down_proj", "qkv"],
}
"""What adapters are on, towers among it, under the names that the whole models have."""


@pytest.mark.parametrize("kind", MULTIMODAL)
@pytest.mark.slow
async def test_the_text_of_a_multimodal_checkpoint(kind: str, tmp_path: Path) -> None:
    model: PreTrainedModel | PeftModel = save(tmp_path / "base", kind)
    shelf = Shelf(tmp_path / "base")
    prompts = [random_prompt(length, length) for length in (30, 12)]
    expected = [logprobs(model, prompt) for prompt in prompts]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        first = r".*language_model.*layers\.0\..*"
        patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {first: 24}}
        model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[kind], **patterns))
        randomise_adapter(model, 0.7)
        model.save_pretrained(tmp_path / "adapter")
    expected += [logprobs(model.eval(), prompt) for prompt in prompts]
    version = shelf.put(tmp_path / "adapter")
    warnings_ = " ".join(shelf.weights[version].manifest.warnings)
    assert ("tensors of towers of images or sound are ignored" in warnings_) == (kind != "gemma3"), warnings_
    sampling = greedy(1, prompt_logprobs=True)
    async with open_worker(shelf, max_batch_tokens=16) as worker:
        answers = await asyncio.gather(
            *(ask(worker, prompt, of, sampling) for of in (None, version) for prompt in prompts)
        )
    for answer, prompt, wanted in zip(answers, prompts * 2, expected, strict=True):
        given = [delta.prompt_logprobs for delta in answer.deltas if delta.prompt_logprobs]
        got = torch.tensor([entry.logprob for part in given for entry in part][1:])
        right = wanted[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(got, right, atol=1e-4, rtol=0)
    assert float((expected[0] - expected[2]).abs().max()) > 0.1, "the adapter does nothing"


@torch.no_grad()
def logprobs(model: PreTrainedModel | PeftModel, prompt: tuple[int, ...]) -> torch.Tensor:
    """(tokens, vocab): what the whole model says after each token of a text."""
    logits: torch.Tensor = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return logits.log_softmax(-1)


def test_a_text_part_is_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    save(tmp_path, "qwen2_5_vl")
    config = read_config(ModelConfig(id="base", source=str(tmp_path)))
    assert config.model_type == "qwen2"
    assert config.tie_word_embeddings
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
