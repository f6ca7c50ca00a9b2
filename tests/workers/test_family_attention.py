"""Older families, whose own code computes attention, answer as transformers and PEFT do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lorafleet.workers.model.rehearsal import NARROW, small_config
from tests.support.adapters import make_adapter
from tests.workers.harness import Shelf, ask, assert_pefts, greedy, open_worker, random_prompt
from tests.workers.test_refusals import save_base

FALCON = {"vocab_size": 304, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "pad_token_id": 0}
GPT = {"vocab_size": 304, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
NEO = {"vocab_size": 304, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
# Slopes of ALiBi for twelve heads are no powers of two, so that the rounding of a family's own code shows.
BASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "falcon": (FALCON, ["query_key_value", "dense"], ["word_embeddings", "lm_head"]),
    "falcon-grouped": (
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        ["query_key_value"],
        ["word_embeddings", "lm_head"],
    ),
    "falcon-alibi": (
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        ["query_key_value"],
        ["word_embeddings", "lm_head"],
    ),
    "bloom": (
        {"vocab_size": 304, "hidden_size": 96, "n_layer": 2, "n_head": 12, "pad_token_id": 0},
        ["query_key_value"],
        ["word_embeddings", "lm_head"],
    ),
    "mpt": (
        {"vocab_size": 304, "d_model": 96, "n_layers": 2, "n_heads": 12, "max_seq_len": 128},
        ["Wqkv"],
        ["wte", "lm_head"],
    ),
    "gptj": ({**GPT, "rotary_dim": 8}, ["q_proj", "v_proj", "out_proj"], ["wte", "lm_head"]),
    "codegen": ({**GPT, "rotary_dim": 8}, ["qkv_proj"], ["wte", "lm_head"]),
    "gpt_neo": (
        {**NEO, "attention_types": [[["global", "local"], 1]], "window_size": 12},
        ["q_proj", "k_proj"],
        ["wte", "lm_head"],
    ),
    "xglm": (
        {"vocab_size": 304, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
        ["q_proj", "out_proj"],
        ["embed_tokens", "lm_head"],
    ),
}
"""Settings, and what adapters are put on: attention, embedding and head."""

SLOW = ("gptj", "codegen", "xglm")
"""Those that others stand for."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BASES])
async def test_answers_are_pefts(name: str, tmp_path: Path) -> None:
    """The base and adapters in one batch; prompts come in parts, beside others that decode."""
    settings, attention, ends = BASES[name]
    shelf = Shelf(save_base(tmp_path / "base", name.partition("-")[0], settings))
    targets = {"attention": attention, "all": "all-linear", "ends": ends}
    versions = [None] + [
        shelf.put(make_adapter(tmp_path / key, shelf.base, r=4, lora_alpha=8, target_modules=value))
        for key, value in targets.items()
    ]
    prompts = [random_prompt(length, length) for length in (5, 50, 33, 18)]
    sampling = greedy(6, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, max_batch_tokens=32) as worker:
        answers = await asyncio.gather(
            *(ask(worker, prompt, version, sampling) for prompt, version in zip(prompts, versions, strict=True))
        )
    for prompt, version, answer in zip(prompts, versions, answers, strict=True):
        assert_pefts(shelf, version, prompt, answer, 1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "falcon",
            {"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True},
        ),
        ("falcon", {"hidden_size": 2048, "num_attention_heads": 32, "multi_query": False, "alibi": True}),
        ("gptj", {}),
    ],
    ids=["falcon-40b", "falcon-rw", "gpt-j-6b"],
)
def test_a_real_geometry_has_a_narrow_copy_to_rehearse(kind: str, settings: dict[str, Any]) -> None:
    small: Any = small_config(AutoConfig.for_model(kind, **settings), NARROW, 2048)
    assert small.hidden_size == 64
    assert small.num_attention_heads == 4
    if kind == "falcon":
        assert small.num_kv_heads == (2 if small.new_decoder_architecture else 4)
    else:
        assert small.rotary_dim <= 64 // 4
