"""Every field of LoraConfig that is served: tokens and logprobs are PEFT's on the same adapter, in one mixed batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.bases import BaseKind
from tests.support.fields import ACTIVATED, SERVED, TOKENS
from tests.support.oracle import generate_with_peft, prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

TOLERANCE = 1e-4
NUM_NEW = 6


KINDS = sorted({case.base for case in SERVED.values()})
QUICK = ("gpt2", "qwen3")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
async def test_logprobs_are_pefts(kind: BaseKind, base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    shelf = Shelf(base_of(kind))
    cases = {name: case for name, case in (SERVED | ACTIVATED).items() if case.base == kind}
    versions = {name: shelf.put(case.make(tmp_path / name, shelf.base)) for name, case in cases.items()}
    # The trained tokens are read, and are among the candidates everywhere.
    prompts = {name: (*random_prompt(5 + number % 7, number), *TOKENS) for number, name in enumerate(cases)}
    sampling = greedy(NUM_NEW, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf) as worker:
        answers = await asyncio.gather(*(ask(worker, prompts[name], versions[name], sampling) for name in cases))
    for name, answer in zip(cases, answers, strict=True):
        folder, prompt = tmp_path / name, prompts[name]
        expected = generate_with_peft(shelf.base, folder, prompt, NUM_NEW)
        assert answer.tokens == expected.tokens, name
        of_prompt = prompt_logprobs_with_peft(shelf.base, folder, prompt)
        given = answer.deltas[0].prompt_logprobs
        assert given is not None
        found = [entry.logprob for entry in (*given[1:], *answer.logprobs)]
        chosen = of_prompt[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        difference = (torch.tensor(found) - torch.cat([chosen, expected.chosen_logprobs])).abs().max()
        assert difference < TOLERANCE, f"{name}: {difference}"
