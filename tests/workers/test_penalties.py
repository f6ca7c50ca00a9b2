"""Penalties and biases against transformers, and the counts they need against lists of tokens."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor

from lorafleet.workers.model.sampler import Sampler
from lorafleet.workers.step.sampling import BIAS, DRAW, NO_SAMPLING, PENALTY, PROMPT, START, SamplingBatch, uniforms
from tests.support.oracle import generate_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

VOCAB = 24
TOLERANCE = 1e-4


class OpenAIPenalties(LogitsProcessor):  # type: ignore[misc]
    """As OpenAI defines them: logit - count * frequency - (count > 0) * presence."""

    def __init__(self, num_prompt: int, presence: float, frequency: float) -> None:
        self._num_prompt = num_prompt
        self._presence, self._frequency = presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, self._num_prompt :], minlength=scores.shape[-1])
        return scores - counts * self._frequency - (counts > 0) * self._presence


ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5},
    {"presence_penalty": -1.0, "frequency_penalty": -0.5},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7, "frequency_penalty": 0.9},
    {"logit_bias": {20: -100.0, 30: 2.5, 31: 100.0}},
    {"logit_bias": {31: 6.0, 40: 6.0}, "presence_penalty": 1.0, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
)


@pytest.mark.slow
async def test_a_mixed_batch_equals_transformers_one_by_one(llama: Shelf) -> None:
    """Beside each other and beside one that asks for nothing; reported logprobs stay the model's own."""
    versions = [None, *llama.versions]
    cases = [(random_prompt(4 + 3 * i, i), versions[i % len(versions)], asked) for i, asked in enumerate(ASKED)]
    async with open_worker(llama) as worker:
        answers = await asyncio.gather(
            *(ask(worker, prompt, version, greedy(40, logprobs=2, **asked)) for prompt, version, asked in cases)
        )
    for (prompt, version, asked), answer in zip(cases, answers, strict=True):
        penalties = OpenAIPenalties(
            len(prompt), asked.get("presence_penalty", 0.0), asked.get("frequency_penalty", 0.0)
        )
        expected = generate_with_peft(
            llama.base,
            llama.folders[version] if version else None,
            prompt,
            40,
            logits_processor=[penalties],
            repetition_penalty=asked.get("repetition_penalty"),
            sequence_bias={(token,): bias for token, bias in asked.get("logit_bias", {}).items()} or None,
        )
        assert answer.tokens == expected.tokens, asked
        reported = torch.tensor([entry.logprob for entry in answer.logprobs])
        torch.testing.assert_close(reported, expected.chosen_logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
async def test_penalties_work(llama: Shelf) -> None:
    """So that the comparison is of something: the base repeats itself, and a penalty stops it."""
    prompt = random_prompt(6, 3)
    async with open_worker(llama) as worker:
        answers = [
            await ask(worker, prompt, None, greedy(60, frequency_penalty=penalty)) for penalty in (-2.0, 0.0, 2.0)
        ]
        forced = await ask(worker, prompt, None, greedy(8, logit_bias={"33": 100}))
    distinct = [len(set(answer.tokens)) for answer in answers]
    assert distinct == sorted(distinct)
    assert distinct[0] < distinct[1] < distinct[2]
    assert set(forced.tokens) == {33}


# --- the sampler alone ---


@dataclass
class Speaker:
    """A sequence of the dict model."""

    line: int
    prompt: list[int]
    penalties: tuple[float, float, float]
    made: list[int] = field(default_factory=list)

    def expected(self, logits: Tensor) -> int:
        scores = logits.double().clone()
        presence, frequency, repetition = self.penalties
        if repetition != 1:
            for token in {*self.prompt, *self.made}:
                scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
        for token, count in Counter(self.made).items():
            scores[token] -= presence + frequency * count
        return int(scores.argmax())


def batch_of(speakers: list[Speaker], temperature: float = 0.0) -> SamplingBatch:
    """As the table of the engine makes it."""
    draws = np.zeros(len(speakers), dtype=DRAW)
    draws["temperature"], draws["top_p"] = temperature, 1.0
    draws["uniform"] = uniforms(
        np.array([one.line for one in speakers], dtype=np.uint64), np.array([len(one.made) for one in speakers])
    )
    penalised = [(row, one) for row, one in enumerate(speakers) if one.penalties != (0, 0, 1)]
    starting = [one for _, one in penalised if not one.made]
    return replace(
        NO_SAMPLING,
        draws=draws,
        penalties=np.array([(row, one.line, *one.penalties) for row, one in penalised], dtype=PENALTY),
        starts=np.array([(one.line,) for one in starting], dtype=START),
        prompts=np.array([(one.line, token) for one in starting for token in one.prompt], dtype=PROMPT),
    )


PENALTIES = st.tuples(
    st.sampled_from([0.0, 1.5, -2.0]), st.sampled_from([0.0, 0.75, -1.0]), st.sampled_from([1.0, 2.0, 0.5])
)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_counts_are_those_of_the_sequence_in_the_line(data: st.DataObject) -> None:
    """Over steps of any sequences in any order, in one pass or two, which end and whose lines others take."""
    sampler = Sampler()
    lines, live = list(range(70)), list[Speaker]()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 20))):
        for _ in range(data.draw(st.integers(0, 3))):
            prompt = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))
            live.append(Speaker(lines.pop(data.draw(st.sampled_from([0, -1]))), prompt, data.draw(PENALTIES)))
        if not live:
            continue
        if data.draw(st.integers(0, 4)) == 0:
            lines.append(live.pop(data.draw(st.integers(0, len(live) - 1))).line)
        chosen = data.draw(st.permutations(live))[: data.draw(st.integers(0, len(live)))]
        if not chosen:
            continue
        logits = torch.randn(len(chosen), VOCAB, generator=generator)
        batch, cut = batch_of(chosen), data.draw(st.integers(0, len(chosen)))
        parts = [(start, end) for start, end in ((0, cut), (cut, len(chosen))) if start < end]
        token_ids = [
            token
            for start, end in parts
            for token in sampler.sample(logits[start:end], batch.part(start, end)).token_ids.tolist()
        ]
        assert token_ids == [one.expected(row) for one, row in zip(chosen, logits, strict=True)]
        for one, token in zip(chosen, token_ids, strict=True):
            one.made.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalised_row_does_not_depend_on_its_batch(temperature: float) -> None:
    def run(order: list[int]) -> list[list[int]]:
        sampler = Sampler()
        speakers = [Speaker(i, [i, i + 1], [(0, 0, 1), (1.5, 0.5, 1), (0, 0, 1.7)][i % 3]) for i in range(9)]
        for step in range(12):
            logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(step))
            chosen = [speakers[i] for i in order]
            for one, token in zip(
                chosen, sampler.sample(logits[order], batch_of(chosen, temperature)).token_ids.tolist(), strict=True
            ):
                one.made.append(token)
        return [one.made for one in speakers]

    together = run(list(range(9)))
    assert run([5, 3, 8, 0, 1, 7, 2, 6, 4]) == together
    for i in range(9):
        assert run([i])[i] == together[i]


class NothingWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses copies between devices that the host would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            assert kwargs.get("non_blocking"), "a copy that waits"
        return result


def everything() -> SamplingBatch:
    """A batch in which every kind of setting is used."""
    batch = batch_of([Speaker(0, [1, 2], (0.5, 0.5, 2.0)), Speaker(1, [3], (0, 0, 1))], temperature=0.7)
    return replace(batch, biases=np.array([(0, 5, 1.0), (1, 2, -1e30)], dtype=BIAS), num_logprobs=2)


def test_the_host_looks_at_nothing_of_the_device() -> None:
    """On the device that has no data, whoever asks for some fails."""
    sampler = Sampler()
    with NothingWaits():  # type: ignore[no-untyped-call]
        for _ in range(2):
            chosen = sampler.sample(torch.zeros(2, VOCAB, device="meta"), everything())
    assert chosen.token_ids.shape == (2,)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_gpu() -> None:
    sampler = Sampler()
    logits = torch.zeros(2, VOCAB, device="cuda")
    sampler.sample(logits, everything())
    with _no_synchronisation():
        chosen = sampler.sample(logits, everything())
    assert chosen.token_ids.shape == (2,)


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
