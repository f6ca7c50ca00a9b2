"""Tokens and logprobs against PEFT and transformers, which compute one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lorafleet.workers.request import SamplingParams, TokenLogprobs
from tests.support.adapters import GPT2_KINDS, make_adapter
from tests.support.bases import BaseKind
from tests.support.oracle import generate_with_peft, prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

TOLERANCE = 1e-4
PROMPT_LENGTHS = (3, 7, 40, 17, 5, 9, 12, 33, 21, 4, 6, 64)


def assert_tops(logprobs: Sequence[TokenLogprobs], expected: torch.Tensor, num_top: int) -> None:
    """Each entry's alternatives are the oracle's likeliest, with its logprobs."""
    for entry, distribution in zip(logprobs, expected, strict=True):
        assert len(entry.top) == num_top
        values = torch.tensor([value for _, value in entry.top])
        torch.testing.assert_close(values, distribution.topk(num_top).values, atol=TOLERANCE, rtol=0)
        ids = [token for token, _ in entry.top]
        torch.testing.assert_close(values, distribution[ids], atol=TOLERANCE, rtol=0)


SLOWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama_tied", "qwen2")]


@pytest.mark.parametrize("kind", ["llama", *SLOWER])
async def test_a_mixed_batch_equals_peft_one_by_one(kind: BaseKind, shelf_of: Callable[[BaseKind], Shelf]) -> None:
    shelf = shelf_of(kind)
    versions = [None, *shelf.versions, None]
    prompts = [random_prompt(length, seed) for seed, length in enumerate(PROMPT_LENGTHS)]
    async with open_worker(shelf) as worker:
        for version in shelf.versions:
            await worker.make_resident(version)
        answers = await asyncio.gather(
            *(
                ask(worker, prompt, version, greedy(64, logprobs=3))
                for prompt, version in zip(prompts, versions, strict=True)
            )
        )
        assert worker.stats.num_steps < 80, "they were not computed together"
    for prompt, used, answer in zip(prompts, versions, answers, strict=True):
        expected = generate_with_peft(shelf.base, shelf.folders[used] if used else None, prompt, 64)
        assert answer.tokens == expected.tokens
        logprobs = torch.tensor([entry.logprob for entry in answer.logprobs])
        torch.testing.assert_close(logprobs, expected.chosen_logprobs, atol=TOLERANCE, rtol=0)
        assert_tops(answer.logprobs, expected.logprobs, 3)
        assert answer.last.finish_reason == "length"
        assert {delta.version for delta in answer.deltas} == {used}


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
@pytest.mark.slow
async def test_other_decoders(kind: BaseKind, base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    """A sliding window of 24 tokens, and norms of queries and keys."""
    shelf = Shelf(base_of(kind))
    versions = [None, *(shelf.put(make_adapter(tmp_path / name, shelf.base, name)) for name in ("rank16", "rank5_odd"))]
    prompts = [random_prompt(length, length) for length in (40, 30, 5)]
    async with open_worker(shelf, max_batch_tokens=16) as worker:
        answers = await asyncio.gather(
            *(ask(worker, prompt, version, greedy(40)) for prompt, version in zip(prompts, versions, strict=True))
        )
    for prompt, version, answer in zip(prompts, versions, answers, strict=True):
        folder = shelf.folders[version] if version else None
        assert answer.tokens == generate_with_peft(shelf.base, folder, prompt, 40).tokens


async def test_gpt2(base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    """Its linear modules are stored transposed, and all of q, k and v are one of them."""
    shelf = Shelf(base_of("gpt2"))
    versions = [None, *(shelf.put(make_adapter(tmp_path / name, shelf.base, name)) for name in GPT2_KINDS)]
    prompt = random_prompt(9, 0)
    async with open_worker(shelf) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, version, greedy(32)) for version in versions))
    for version, answer in zip(versions, answers, strict=True):
        folder = shelf.folders[version] if version else None
        assert answer.tokens == generate_with_peft(shelf.base, folder, prompt, 32).tokens


@pytest.mark.parametrize("logits_chunk_tokens", [512, 5])
async def test_prompt_logprobs(llama: Shelf, logits_chunk_tokens: int) -> None:
    """In one pass and in many, beside requests that want none."""
    versions = [None, llama.version_of("rank16"), llama.version_of("embeddings_all")]
    prompts = [random_prompt(length, length) for length in (31, 18, 1)]
    sampling = greedy(4, logprobs=2, prompt_logprobs=True)
    async with open_worker(llama, logits_chunk_tokens=logits_chunk_tokens) as worker:
        asking = [ask(worker, prompt, version, sampling) for prompt, version in zip(prompts, versions, strict=True)]
        answers = await asyncio.gather(*asking, ask(worker, prompts[0], None, greedy(16)))
    for prompt, version, answer in zip(prompts, versions, answers, strict=False):
        expected = prompt_logprobs_with_peft(llama.base, llama.folders[version] if version else None, prompt)
        (first, *others) = answer.deltas
        assert first.prompt_logprobs is not None
        assert all(delta.prompt_logprobs is None for delta in others)
        assert [entry.token_id for entry in first.prompt_logprobs] == list(prompt)
        assert first.prompt_logprobs[0] == TokenLogprobs(prompt[0], None, ())
        for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
            assert entry.logprob == pytest.approx(float(expected[position - 1, prompt[position]]), abs=TOLERANCE)
        assert_tops(first.prompt_logprobs[1:], expected[:-1], 2)


async def test_text_is_that_of_the_tokens(llama: Shelf) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama.base)
    prompt = tuple(tokenizer.encode("The quick brown fox"))
    async with open_worker(llama) as worker:
        answer = await ask(worker, prompt, None, greedy(40))
    assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)


async def test_the_end_token_ends_the_answer_and_is_not_text(llama: Shelf) -> None:
    free = SamplingParams(max_tokens=24, temperature=0.0)
    prompt = random_prompt(6, 5)
    async with open_worker(llama) as worker:
        whole = await ask(worker, prompt, None, greedy(24))
        stop_id = whole.tokens[9]
        length = whole.tokens.index(stop_id) + 1
        stopped = await ask(worker, prompt, None, free.model_copy(update={"stop_token_ids": (stop_id,)}))
        later = await ask(
            worker, prompt, None, free.model_copy(update={"stop_token_ids": (stop_id,), "min_tokens": length})
        )
    assert stopped.tokens == whole.tokens[:length]
    assert (stopped.last.finish_reason, stopped.last.stop_reason) == ("stop", stop_id)
    assert whole.text.startswith(stopped.text)
    assert len(stopped.text) < len(whole.text)
    assert stop_id not in later.tokens[: length - 1]
    assert len(later.tokens) >= length


async def test_a_stop_string_ends_the_answer(llama: Shelf) -> None:
    prompt = random_prompt(6, 5)
    async with open_worker(llama) as worker:
        whole = await ask(worker, prompt, None, greedy(24))
        stop = whole.text[6:9]
        stopped = await ask(worker, prompt, None, greedy(24, stop=[stop]))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.last.finish_reason, stopped.last.stop_reason) == ("stop", stop)


@pytest.mark.slow
async def test_a_seed_is_an_answer(llama: Shelf) -> None:
    """Whatever is in the batch beside it."""
    prompt, version = random_prompt(8, 1), llama.version_of("rslora")
    sampling = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=11, ignore_eos=True)
    async with open_worker(llama) as worker:
        alone = await ask(worker, prompt, version, sampling)
        others = [
            ask(worker, random_prompt(5 + number, number), one, sampling.model_copy(update={"seed": number}))
            for number, one in enumerate(llama.versions)
        ]
        among, *_ = await asyncio.gather(ask(worker, prompt, version, sampling), *others)
        other_seed = await ask(worker, prompt, version, sampling.model_copy(update={"seed": 12}))
        unseeded = await ask(worker, prompt, version, sampling.model_copy(update={"seed": None}))
    assert among.tokens == alone.tokens
    assert len({alone.tokens, other_seed.tokens, unseeded.tokens}) == 3
