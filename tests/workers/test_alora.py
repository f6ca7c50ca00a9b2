"""Activated LoRA: the base computes what is before the invocation, and shares it; what follows is as PEFT has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.workers.sequence import last_occurrence
from tests.support.adapters import ALL_SEVEN, make_adapter
from tests.support.bases import BaseKind
from tests.support.fields import make_resized
from tests.support.oracle import generate_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt
from tests.workers.test_replayed_steps import BY_PROMPT, BY_ROW, replay

INVOCATION = (3, 7, 250)
NUM_NEW = 8


@pytest.fixture(scope="module")
def shelf(base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    shelf, folder = Shelf(base_of("llama")), tmp_path_factory.mktemp("alora")
    recipes: dict[str, dict[str, Any]] = {
        "one": {"alora_invocation_tokens": list(INVOCATION), "target_modules": ALL_SEVEN},
        "two": {"alora_invocation_tokens": list(INVOCATION), "target_modules": (*ALL_SEVEN, "lm_head"), "r": 9},
        "other": {"alora_invocation_tokens": [77], "target_modules": ALL_SEVEN},
        "plain": {"target_modules": ALL_SEVEN},
        "lora-bias": {"alora_invocation_tokens": list(INVOCATION), "lora_bias": True, "bias": "lora_only"},
    }
    for name, options in recipes.items():
        shelf.put(make_adapter(folder / name, shelf.base, "rank4_qv", **options))
    return shelf


def prompts_of(number: int) -> list[tuple[int, ...]]:
    """With the invocation early, late, at a page's end, twice, last, first, and not at all."""
    part = random_prompt(60, number)
    return [
        (*part[:5], *INVOCATION, *part[5:30]),
        (*part[:41], *INVOCATION, *part[41:44]),
        (*part[:32], *INVOCATION, *part[32:40]),
        (*part[:6], *INVOCATION, *part[6:20], *INVOCATION, *part[20:33]),
        (*part[:20], *INVOCATION),
        (*INVOCATION, *part[:9]),
        part[:23],
    ]


async def ask_all(shelf: Shelf, **settings: Any) -> int:
    """Everything at once, each against PEFT; how many steps had a form."""
    asked = [
        (version, prompt)
        for number, version in enumerate((None, *shelf.versions))
        for prompt in (*prompts_of(1), *prompts_of(2 + number))
    ]
    sampling = greedy(NUM_NEW, logprobs=0)
    async with open_worker(shelf, **settings) as worker:
        for _ in range(2):  # the second time from the prefix cache
            answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for version, prompt in asked))
            for (version, prompt), answer in zip(asked, answers, strict=True):
                expected = generate_with_peft(shelf.base, shelf.folders.get(version or ""), prompt, NUM_NEW)
                assert answer.tokens == expected.tokens, (version, prompt)
                found = torch.tensor([entry.logprob for entry in answer.logprobs])
                assert (found - expected.chosen_logprobs).abs().max() < 1e-4
    return sum(answer.last.num_cached_tokens for answer in answers)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens": 16}, {"kv_bytes": 300_000}, {"prefix_cache": False}],
    ids=["at-once", "in-chunks", "preempted", "uncached"],
)
@pytest.mark.slow
async def test_as_peft(shelf: Shelf, settings: dict[str, Any]) -> None:
    num_cached = await ask_all(shelf, **settings)
    assert (num_cached > 0) == settings.get("prefix_cache", True)


@pytest.mark.parametrize("forms", [BY_ROW, BY_PROMPT], ids=["by row", "by prompt"])
@pytest.mark.slow
async def test_in_graphs(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, forms: Any) -> None:
    replayed = replay(monkeypatch, forms)
    await ask_all(shelf, max_running=40)
    assert any(batch.segments.num_lora_chunks for batch in replayed)


async def test_what_is_before_the_invocation_is_computed_once_for_all(shelf: Shelf) -> None:
    context = random_prompt(64, 9)
    versions = [None, *map(shelf.version_of, ("one", "two", "other", "plain"))]
    async with open_worker(shelf) as worker:
        cached = []
        for version in versions:
            answer = await ask(worker, (*context, 77, *INVOCATION), version, greedy(2))
            cached.append(answer.last.num_cached_tokens)
        again = await ask(worker, (*context, 77, *INVOCATION, 5, 6), shelf.version_of("one"), greedy(2))
        back = await ask(worker, (*context, 8), None, greedy(2))
    assert cached == [0, 64, 64, 64, 0]
    assert [answer.last.num_cached_tokens for answer in (again, back)] == [64, 64]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {"bias": "lora_only"}),
        ("llama", {"modules_to_save": ["norm"]}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"trainable_token_indices": [7]}),
        ("llama", {"num_tokens": 2}),
    ],
    ids=["bias", "norm", "head", "tokens", "vocabulary"],
)
def test_what_would_act_before_the_invocation_is_refused(
    base_of: Callable[[BaseKind], Path], tmp_path: Path, kind: BaseKind, options: dict[str, Any]
) -> None:
    """PEFT changes all tokens then, and the base computes those before the invocation here."""
    shelf = Shelf(base_of(kind))
    num_tokens = options.pop("num_tokens", 0)
    folder = make_resized(tmp_path / "a", shelf.base, num_tokens, alora_invocation_tokens=[3, 7], **options)
    with pytest.raises(AdapterRefused, match="before the invocation") as caught:
        shelf.put(folder)
    assert caught.value.param == "alora_invocation_tokens"


def test_the_last_occurrence_counts() -> None:
    assert last_occurrence((1, 2), (1, 2, 1, 2, 1)) == 2
    assert last_occurrence((1, 1), (1, 1, 1)) == 1
    assert last_occurrence((1, 2), (2, 1)) is None
    assert last_occurrence((1, 2), (1,)) is None
