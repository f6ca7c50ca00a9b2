"""Workers of several ranks against PEFT and transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.oracle import prompt_logprobs_with_peft
from tests.workers.harness import Answer, Shelf, ask, greedy, open_worker, random_prompt

NUM_NEW = 10


def check(shelf: Shelf, version: str | None, prompt: tuple[int, ...], answer: Answer, tolerance: float = 1e-4) -> None:
    """Each token is among the likeliest, and every logprob, the prompt's too, is what PEFT gives."""
    tokens = (*prompt, *answer.tokens)
    expected = prompt_logprobs_with_peft(shelf.base, shelf.folders.get(version or ""), tokens)[:-1]
    chosen = expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    given = answer.deltas[0].prompt_logprobs
    assert given is not None
    found = torch.tensor([entry.logprob for entry in (*given[1:], *answer.logprobs)])
    assert (found - chosen).abs().max() < tolerance
    assert (expected.max(-1).values - chosen)[len(prompt) - 1 :].max() <= tolerance
    assert len(answer.tokens) == NUM_NEW


async def ask_all(shelf: Shelf, **settings: object) -> list[tuple[str | None, tuple[int, ...], Answer]]:
    """The base and each adapter in one mixed batch, twice."""
    versions = [None, *shelf.versions]
    prompts = [random_prompt(3 + 4 * number, number) for number in range(len(versions))]
    asked = [(version, prompt) for version, own in zip(versions, prompts, strict=True) for prompt in (own, prompts[-1])]
    sampling = greedy(NUM_NEW, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, **settings) as worker:  # type: ignore[arg-type]
        answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for version, prompt in asked))
    return [(version, prompt, answer) for (version, prompt), answer in zip(asked, answers, strict=True)]


@pytest.fixture(scope="module")
def shelf_of(
    base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[BaseKind], Shelf]:
    made: dict[BaseKind, Shelf] = {}

    def of(kind: BaseKind) -> Shelf:
        if kind not in made:
            shelf, folder = Shelf(base_of(kind)), tmp_path_factory.mktemp(f"ranks-{kind}")
            for recipe in ("rank16", "embeddings_all", "rank4_qv"):
                shelf.put(make_adapter(folder / recipe, shelf.base, recipe))
            shelf.put(make_adapter(folder / "dora", shelf.base, "embeddings_all", use_dora=True, bias="all"))
            made[kind] = shelf
        return made[kind]

    return of


async def test_two_ranks(shelf_of: Callable[[BaseKind], Shelf]) -> None:
    shelf = shelf_of("qwen2")
    answers = await ask_all(shelf, tensor_parallel_size=2)
    for version, prompt, answer in answers:
        check(shelf, version, prompt, answer)
    alone = await ask_all(shelf)
    assert [answer.tokens for *_, answer in answers] == [answer.tokens for *_, answer in alone]
