"""Fused decoder layers against PEFT: chunks and decodes of a mixed batch, and what they leave alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind, make_base
from tests.support.oracle import generate_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker

NUM_TOKENS = 24


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
async def test_a_mixed_batch_says_what_peft_says(
    kind: BaseKind, base_of: Callable[[BaseKind], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(kind)
    shelf = Shelf(base)
    folders = [None, make_adapter(tmp_path / "a", base, "rank16"), make_adapter(tmp_path / "b", base, "rank4_qv")]
    versions = [None if folder is None else shelf.put(folder) for folder in folders]
    prompts = [range(5, 5 + length) for length in (3, 70, 41)]
    with caplog.at_level(logging.INFO):
        # 16 tokens a step: prompts go in chunks, beside decodes.
        async with open_worker(shelf, max_batch_tokens=16) as worker:
            answers = await asyncio.gather(
                *(
                    ask(worker, prompt, version, greedy(NUM_TOKENS, logprobs=0))
                    for prompt in prompts
                    for version in versions
                )
            )
    assert "fused layers" in caplog.text
    cases = [(prompt, folder) for prompt in prompts for folder in folders]
    for (prompt, folder), answer in zip(cases, answers, strict=True):
        expected = generate_with_peft(base, folder, prompt, NUM_TOKENS)
        assert answer.tokens == expected.tokens
        logprobs = torch.tensor([entry.logprob for entry in answer.logprobs])
        assert (logprobs - expected.chosen_logprobs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "overrides"), [("gpt2", {}), ("llama", {"hidden_act": "gelu"})], ids=["gpt2", "llama_gelu"]
)
async def test_another_kind_runs_transformers_own_layers(
    kind: BaseKind, overrides: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base", kind, **overrides)
    with caplog.at_level(logging.INFO):
        async with open_worker(Shelf(base)) as worker:
            answer = await ask(worker, range(5, 20), None, greedy(8))
    assert "transformers' own layers (" in caplog.text
    assert answer.tokens == generate_with_peft(base, None, range(5, 20), 8).tokens
