"""Frequencies that transformers chooses by the longest sequence of a pass: the same answer whatever stands beside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.workers.config import ModelConfig
from tests.support.bases import make_base
from tests.support.oracle import prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "longrope-long": (LONG, 512, 512),
    "longrope-short": (LONG, 512, 64),
    "dynamic-stretched": (DYNAMIC, 64, 256),
    "dynamic-within": (DYNAMIC, 64, 64),
    "yarn-stretched": (YARN, 64, 256),
}
"""Rope parameters, the base's positions, and the worker's `max_model_len`."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
async def test_frequencies_follow_the_longest_that_a_worker_serves(case: str, tmp_path: Path) -> None:
    """Short and long prompts in one batch, the long ones in chunks."""
    parameters, positions, longest = CASES[case]
    shelf = Shelf(make_base(tmp_path, rope_parameters=parameters, max_position_embeddings=positions))
    prompts = [random_prompt(length, length) for length in (3, 20, min(200, longest - 10))]
    model = ModelConfig(id="base", source=str(shelf.base), max_model_len=longest)
    sampling = greedy(6, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, model=model, max_batch_tokens=48) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, None, sampling) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = prompt + answer.tokens
        expected = prompt_logprobs_with_peft(shelf.base, None, tokens, max_model_len=longest)
        assert answer.deltas[0].prompt_logprobs is not None
        entries = [*answer.deltas[0].prompt_logprobs[1:], *answer.logprobs]
        got = torch.tensor([entry.logprob for entry in entries])
        ids = torch.tensor(tokens[1:])
        torch.testing.assert_close(got, expected[:-1].gather(1, ids[:, None])[:, 0], atol=1e-4, rtol=0)
