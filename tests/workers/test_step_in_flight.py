"""A GPU's order of events on a CPU: a step is launched before the last one's tokens are known."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from lorafleet.workers.config import EngineConfig, ModelConfig
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.request import SamplingParams
from tests.workers.harness import ENGINE, Answer, Shelf, ask, greedy, open_worker, random_prompt, request_of

PAGE_BYTES = 8192
"""KV of 16 tokens of the tiny Llama."""


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)


def requests(shelf: Shelf) -> list[tuple[tuple[int, ...], str | None, SamplingParams]]:
    """Of every kind: with stops, seeds, penalties, prompt logprobs; for the base and all adapters."""
    several = []
    for number, version in enumerate([None, *shelf.versions, *shelf.versions]):
        prompt = random_prompt(3 + 11 * number % 70, number)
        sampling = greedy(20 + number)
        if number % 4 == 1:
            sampling = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=number, ignore_eos=True)
        if number % 8 == 4:
            sampling = greedy(30, presence_penalty=1.5, repetition_penalty=1.4, logit_bias={7: -100, number: 3})
        if number % 8 == 5:
            sampling = sampling.model_copy(update={"frequency_penalty": 0.7, "repetition_penalty": 0.8, "min_p": 0.01})
        if number % 4 == 2:
            sampling = greedy(12, logprobs=2, prompt_logprobs=True)
        if number % 4 == 3:
            sampling = greedy(40, stop=["e", "\ufffd"], min_tokens=2)
        several.append((prompt, version, sampling))
    return several


async def ask_all(shelf: Shelf, engine: EngineConfig = ENGINE, **settings: object) -> tuple[list[Answer], int]:
    """All requests at once; how often one was preempted."""
    model = ModelConfig(id="base", source=str(shelf.base), max_model_len=128)
    async with open_worker(shelf, model=model, engine=engine.model_copy(update=settings)) as worker:
        answers = await asyncio.gather(*(ask(worker, *request) for request in requests(shelf)))
        return answers, worker._engine._scheduler.num_preemptions


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.tokens == wanted.tokens
        assert answer.text == wanted.text
        assert (answer.last.finish_reason, answer.last.stop_reason) == (
            wanted.last.finish_reason,
            wanted.last.stop_reason,
        )
        given, right = answer.deltas[0].prompt_logprobs or (), wanted.deltas[0].prompt_logprobs or ()
        assert [entry.token_id for entry in given] == [entry.token_id for entry in right]
        assert [entry.logprob for entry in given[1:]] == pytest.approx([entry.logprob for entry in right[1:]], abs=1e-4)


@pytest.mark.slow
async def test_the_answers_are_the_same(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plenty of memory, in tiny chunks, and with so little memory that requests are preempted all the time."""
    expected, _ = await ask_all(llama)
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
    assert_same((await ask_all(llama))[0], expected)
    assert_same((await ask_all(llama, max_batch_tokens=7, logits_chunk_tokens=5))[0], expected)
    scarce = EngineConfig(device="cpu", max_batch_tokens=40, logits_chunk_tokens=6, kv_bytes=11 * PAGE_BYTES)
    for prefix_cache in (True, False):
        answers, num_preemptions = await ask_all(llama, engine=scarce, prefix_cache=prefix_cache)
        assert_same(answers, expected)
        assert num_preemptions >= 3


@pytest.mark.usefixtures("asynchronous")
async def test_who_goes_leaves_nothing_in_flight(llama: Shelf) -> None:
    async with open_worker(llama) as worker:

        async def leave(number: int) -> None:
            version = [None, *llama.versions][number % 4]
            async with aclosing(worker.generate(request_of(random_prompt(9, number), version, greedy(60)))) as stream:
                for _ in range(number % 7):
                    await anext(stream)

        await asyncio.gather(*(leave(number) for number in range(40)))
        await worker.reconcile({})
        expected = await ask(worker, random_prompt(9, 0), llama.versions[0], greedy(20))
        again = await ask(worker, random_prompt(9, 0), llama.versions[0], greedy(20))
        assert expected.tokens == again.tokens


@pytest.mark.usefixtures("asynchronous")
async def test_an_overflow_in_flight_ends_one_request(llama: Shelf) -> None:
    shelf = Shelf(llama.base)
    shelf.put(llama.folders[llama.version_of("rank16")])
    huge = shelf.put_huge(shelf.versions[0], factor=1e30)
    async with open_worker(shelf) as worker:
        results = await asyncio.gather(
            ask(worker, random_prompt(9, 0), huge, greedy(20)),
            ask(worker, random_prompt(9, 0), None, greedy(20)),
            return_exceptions=True,
        )
    assert getattr(results[0], "code", None) == "non_finite_output"
    assert isinstance(results[1], Answer)
