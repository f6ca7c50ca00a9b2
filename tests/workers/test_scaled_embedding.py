"""Adapters of an embedding that scales what it gives (Gemma): all that PEFT trains there is scaled with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.adapters import make_adapter
from tests.support.oracle import prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt
from tests.workers.test_refusals import SERVED, save_base

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["embed_tokens", "q_proj"]},
    "all": {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7, 250]}},
    "copy": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_what_peft_trains_of_it(tmp_path: Path, size: int) -> None:
    shelf = Shelf(save_base(tmp_path / "base", "gemma3_text", {**SERVED["gemma3_text"], "tie_word_embeddings": False}))
    versions = [
        None,
        *(
            shelf.put(make_adapter(tmp_path / name, shelf.base, r=4, lora_alpha=8, **recipe))
            for name, recipe in RECIPES.items()
        ),
    ]
    prompts = [(3, 7, 250, *random_prompt(12 + index, index)) for index in range(len(versions))]
    sampling = greedy(6, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, max_batch_tokens=32, tensor_parallel_size=size) as worker:
        answers = await asyncio.gather(
            *(ask(worker, prompt, version, sampling) for prompt, version in zip(prompts, versions, strict=True))
        )
    base_only = []
    for prompt, version, answer in zip(prompts, versions, answers, strict=True):
        tokens = prompt + answer.tokens
        expected = prompt_logprobs_with_peft(shelf.base, shelf.folders[version] if version else None, tokens)
        base_only.append(prompt_logprobs_with_peft(shelf.base, None, tokens))
        assert answer.deltas[0].prompt_logprobs is not None
        got = torch.tensor([each.logprob for each in [*answer.deltas[0].prompt_logprobs[1:], *answer.logprobs]])
        wanted = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
        assert version is None or float((expected - base_only[-1]).abs().max()) > 0.1, "the adapter does nothing"
