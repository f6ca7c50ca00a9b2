"""Modules between the body and the output embedding: their rows are the logits', and no other adapter acts on them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch

from tests.support.adapters import make_adapter
from tests.support.oracle import prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt
from tests.workers.test_refusals import save_base

MODERN = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "local_attention": 16,
    "layer_types": ["full_attention", "sliding_attention"],
    "pad_token_id": 0,
}


async def test_an_adapter_of_the_head_s_dense_layer_reaches_its_own_rows_only(tmp_path: Path) -> None:
    """As many logits rows as rows, in another order: a step of prompts that want logprobs, beside decodes."""
    shelf = Shelf(save_base(tmp_path / "base", "modernbert-decoder", MODERN))
    recipe: dict[str, Any] = {"r": 4, "target_modules": ["lm_head.dense", "Wo"], "modules_to_save": ["lm_head.norm"]}
    versions = [
        None,
        shelf.put(make_adapter(tmp_path / "one", shelf.base, seed=1, strength=1.5, **recipe)),
        shelf.put(make_adapter(tmp_path / "two", shelf.base, seed=2, strength=1.5, **recipe)),
        None,
    ]
    sampling = greedy(5, logprobs=0, prompt_logprobs=True)
    prompts = [random_prompt(length, length) for length in (5, 9, 2, 14)]
    async with open_worker(shelf, max_batch_tokens=16) as worker:
        answers = await asyncio.gather(
            *(ask(worker, prompt, version, sampling) for prompt, version in zip(prompts, versions, strict=True))
        )
    for prompt, version, answer in zip(prompts, versions, answers, strict=True):
        tokens = prompt + answer.tokens
        expected = prompt_logprobs_with_peft(shelf.base, shelf.folders[version] if version else None, tokens)
        assert answer.deltas[0].prompt_logprobs is not None
        got = torch.tensor([each.logprob for each in [*answer.deltas[0].prompt_logprobs[1:], *answer.logprobs]])
        torch.testing.assert_close(
            got, expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0], atol=1e-4, rtol=0
        )
