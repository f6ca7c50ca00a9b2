"""Guessed tokens change how many steps an answer takes, and nothing of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.workers import speculation
from lorafleet.workers.config import EngineConfig, ModelConfig, SpeculationConfig
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.request import SamplingParams
from lorafleet.workers.speculation import NGRAM_TOKENS, Guesser, pays
from lorafleet.workers.stats import ServedCounts
from tests.workers.harness import ENGINE, Answer, Shelf, ask, greedy, open_worker, random_prompt

Request = tuple[Sequence[int], str | None, SamplingParams]
FOUR = SpeculationConfig(tokens=4)
PAGE_BYTES = 8192
"""KV of 16 tokens of the tiny Llama."""


def repetitive(length: int, seed: int) -> tuple[int, ...]:
    """A prompt that says the same over and over."""
    return (random_prompt(5, seed) * length)[:length]


def requests(shelf: Shelf) -> list[Request]:
    """Greedy and drawn, with stops, logprobs, penalties, biases and a grammar; of the base and of adapters."""
    several: list[Request] = []
    for number, version in enumerate([None, *shelf.versions[:5]]):
        prompt = repetitive(30 + number, number)
        several.append((prompt, version, greedy(40 + number)))
        several.append((prompt, version, SamplingParams(max_tokens=30, temperature=0.3, seed=number, ignore_eos=True)))
    several += [
        (repetitive(20, 7), None, greedy(40, logprobs=2, prompt_logprobs=True)),
        (repetitive(20, 8), None, greedy(40, stop=["e", "\ufffd"], min_tokens=2)),
        (repetitive(20, 9), None, greedy(30, repetition_penalty=1.4)),
        (repetitive(20, 10), None, greedy(30, logit_bias={7: 5.0}, min_tokens=9)),
        (
            repetitive(20, 11),
            None,
            SamplingParams(max_tokens=30, temperature=0.0, structured_outputs={"regex": "[ab]{3,9}"}),
        ),
    ]
    return several


async def ask_all(shelf: Shelf, asked: list[Request], **settings: object) -> tuple[list[Answer], ServedCounts]:
    """The answers to all requests at once, and the counts."""
    model = ModelConfig(id="base", source=str(shelf.base), max_model_len=128)
    engine = EngineConfig.model_validate(ENGINE.model_dump() | {"max_running": 8} | settings)
    async with open_worker(shelf, model=model, engine=engine) as worker:
        answers = await asyncio.gather(*(ask(worker, *request) for request in asked))
        return answers, await worker.served()


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.tokens == wanted.tokens
        assert answer.text == wanted.text
        assert answer.last.finish_reason == wanted.last.finish_reason
        assert answer.last.stop_reason == wanted.last.stop_reason
        assert [entry.token_id for entry in answer.logprobs] == [entry.token_id for entry in wanted.logprobs]
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx(
            [entry.logprob for entry in wanted.logprobs], abs=1e-4
        )


@pytest.mark.parametrize("is_asynchronous", [False, True])
async def test_answers_stay_the_same(llama: Shelf, is_asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plenty of memory, and with so little and so small steps that requests are preempted and guesses cut."""
    monkeypatch.setattr(speculation, "MIN_GAIN", 0.01)
    asked = requests(llama)
    expected, without = await ask_all(llama, asked)
    assert without.num_guessed_tokens == 0
    monkeypatch.setattr(ModelRunner, "is_asynchronous", is_asynchronous)
    answers, counts = await ask_all(llama, asked, speculation=FOUR)
    assert_same(answers, expected)
    assert 0 < counts.num_confirmed_tokens <= counts.num_guessed_tokens
    assert counts.num_generated_tokens == without.num_generated_tokens
    scarce = {"max_batch_tokens": 24, "logits_chunk_tokens": 3, "kv_bytes": 12 * PAGE_BYTES}
    answers, counts = await ask_all(llama, asked, speculation=FOUR, **scarce)
    assert_same(answers, expected)
    assert counts.num_preemptions >= 1
    assert counts.num_confirmed_tokens > 0


async def test_a_repetitive_answer_takes_few_steps(llama: Shelf) -> None:
    """And what it leaves in the prefix cache is right: the same prompt, longer, goes on from there."""
    prompt, same = repetitive(40, 1), greedy(200, logit_bias={7: 100.0})
    async with open_worker(llama, speculation=None) as worker:
        expected = await ask(worker, prompt, None, same)
        longer = (*prompt, *expected.tokens[:170])
        rest = await ask(worker, longer, None, greedy(20))
    async with open_worker(llama, speculation=FOUR) as worker:
        assert (await ask(worker, prompt, None, same)).tokens == expected.tokens
        assert worker.stats.num_steps < 200 / 4
        again = await ask(worker, longer, None, greedy(20))
        assert again.tokens == rest.tokens
        assert again.last.num_cached_tokens >= 192


def naive(tokens: list[int], count: int) -> list[int]:
    """What followed the last earlier occurrence of the latest tokens, found by looking everywhere."""
    for start in range(len(tokens) - NGRAM_TOKENS - 1, -1, -1):
        if tokens[start : start + NGRAM_TOKENS] == tokens[-NGRAM_TOKENS:]:
            guess: list[int] = []
            for place in range(start + NGRAM_TOKENS, start + NGRAM_TOKENS + count):
                guess.append((tokens + guess)[place])
            return guess
    return []


@given(
    st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 9)
)
def test_a_guess_is_what_followed_before(prompt: list[int], answer: list[int], count: int) -> None:
    guesser = Guesser(prompt)
    for place, token_id in enumerate(answer, 1):
        guesser.take(token_id)
        assert guesser.guess(count) == naive(prompt + answer[:place], count)
    assert 0.0 <= guesser.confidence <= 1.0
    assert guesser.gain(count) <= count


def test_guessing_ends_where_it_does_not_pay() -> None:
    right, wrong = Guesser((1, 2, 3) * 4), Guesser((1, 2, 3) * 4)
    for number in range(30):
        right.take((1, 2, 3)[number % 3])
        wrong.take((1, 2, 3)[number % 3] if number % 4 else 9)
    assert right.confidence > 0.9
    assert pays([right], 4)
    for number in range(40):  # what followed came again, but something else follows each time
        wrong.take((5, 6, 7, 10 + number)[number % 4])
    assert not pays([wrong], 4)
    assert not pays([right, *[None] * 9], 4), "most sequences would wait for one"
    assert not pays([right] * 13, 4), "so many rows take longer than one"
    assert not pays([], 4)
