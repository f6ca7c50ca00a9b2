"""Replies of a real worker, read by the stock client: their numbers are PEFT's, and their fields what it expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from torch import Tensor

from tests.cluster.engines import engine_service
from tests.cluster.serving import BASE_ID, Service
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.oracle import generate_with_peft, prompt_logprobs_with_peft
from tests.workers.harness import Shelf, random_prompt

TOLERANCE = 1e-4
NUM_TOKENS = 12
MESSAGES: Any = [{"role": "user", "content": "What is the sky?"}]
GREEDY = {"temperature": 0, "max_tokens": NUM_TOKENS}
EXTRA = {"ignore_eos": True, "return_token_ids": True}
MODELS = (BASE_ID, "rank16", "embeddings_all")


@pytest.fixture(scope="module")
def shelf(base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    shelf = Shelf(base_of("llama"))
    for kind in MODELS[1:]:
        shelf.put(make_adapter(tmp_path_factory.mktemp("adapters") / kind, shelf.base, kind))
    return shelf


@pytest.fixture(scope="module")
def engine(shelf: Shelf) -> Iterator[Service]:
    with engine_service(shelf) as service:
        yield service


def folder_of(shelf: Shelf, model: str) -> Path | None:
    return None if model == BASE_ID else shelf.folders[shelf.version_of(model)]


def assert_logprobs(logprobs: Sequence[float], token_ids: Sequence[int], expected: Tensor) -> None:
    """expected: (tokens, vocab), the distribution of each."""
    wanted = expected.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), wanted, atol=TOLERANCE, rtol=0)


def assert_tops(tops: Sequence[Sequence[float]], expected: Tensor) -> None:
    """Each one's values, best first, are those of the likeliest tokens."""
    for top, distribution in zip(tops, expected, strict=True):
        torch.testing.assert_close(torch.tensor(top), distribution.topk(len(top)).values, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "penalties", [{}, {"frequency_penalty": 1.5, "logit_bias": {"9": 4}}], ids=["plain", "penalised"]
)
def test_chat_logprobs_are_pefts(
    engine: Service, shelf: Shelf, model: str, stream: bool, penalties: dict[str, Any]
) -> None:
    reply: Any = engine.client().chat.completions.create(
        model=model,
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=5,
        stream=stream,
        extra_body=EXTRA,
        **GREEDY,
        **penalties,
    )
    chunks = list(reply) if stream else [reply]
    token_ids = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    prompt = chunks[0].prompt_token_ids
    # Whatever was chosen and why: the model's own opinion of it.
    expected = prompt_logprobs_with_peft(shelf.base, folder_of(shelf, model), [*prompt, *token_ids])[len(prompt) - 1 :]
    assert_logprobs([entry.logprob for entry in entries], token_ids, expected[:NUM_TOKENS])
    tops = [[top.logprob for top in entry.top_logprobs] for entry in entries]
    assert {len(top) for top in tops} == {5}
    assert_tops(tops, expected[:NUM_TOKENS])
    if not penalties:
        assert token_ids == list(generate_with_peft(shelf.base, folder_of(shelf, model), prompt, NUM_TOKENS).tokens)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_logprobs_of_prompt_and_completion_are_pefts(engine: Service, shelf: Shelf, model: str, stream: bool) -> None:
    prompt = list(random_prompt(23, 4))
    reply: Any = engine.client().completions.create(
        model=model, prompt=prompt, echo=True, logprobs=3, stream=stream, extra_body=EXTRA, **GREEDY
    )
    parts = [chunk.choices[0] for chunk in (reply if stream else [reply])]
    token_ids = [token for part in parts for token in part.token_ids]
    assert token_ids == list(generate_with_peft(shelf.base, folder_of(shelf, model), prompt, NUM_TOKENS).tokens)
    first, *values = [value for part in parts for value in part.logprobs.token_logprobs]
    assert first is None
    expected = prompt_logprobs_with_peft(shelf.base, folder_of(shelf, model), [*prompt, *token_ids])[:-1]
    assert_logprobs(values, [*prompt, *token_ids][1:], expected)
    tops = [sorted(top.values(), reverse=True)[:3] for part in parts for top in part.logprobs.top_logprobs if top]
    assert_tops(tops, expected)
    texts = [text for part in parts for text in part.logprobs.tokens]
    tokenizer = engine.prompts.tokenizer
    assert tokenizer is not None
    assert len(texts) == len(prompt) + len(token_ids)
    assert "".join(part.text for part in parts) == tokenizer.decode(prompt) + tokenizer.decode(token_ids)


ASKED = [
    {"n": n, **logprobs, **stop}
    for n, logprobs, stop in product((1, 3), ({}, {"logprobs": 2}), ({}, {"stop": list("aeiou hnrst")}))
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"n{asked['n']}-" + "-".join(list(asked)[1:]))
def test_a_stream_adds_up_to_the_whole_completion(engine: Service, asked: dict[str, Any]) -> None:
    client = engine.client()
    request: dict[str, Any] = {"model": "rank16", "prompt": ["The quick", "brown fox"], "seed": 5, **asked}
    whole = client.completions.create(**request)
    Completion.model_validate(whole.model_dump(), strict=True)
    *chunks, last = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    for chunk in (*chunks, last):
        shown = chunk.model_dump()
        for choice in shown["choices"]:
            choice["finish_reason"] = (
                choice["finish_reason"] or "length"
            )  # null in OpenAI's chunks, but not in its types
        Completion.model_validate(shown, strict=True)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.usage for chunk in chunks} == {None}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in (*chunks, last)}) == 1
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [*[None] * (len(parts) - 1), choice.finish_reason]
        found = [part.logprobs.model_dump() for part in parts if part.logprobs]
        joined = {name: [value for part in found for value in part[name]] for name in (found[0] if found else ())}
        assert joined == (choice.logprobs.model_dump() if choice.logprobs else {})
    assert [choice.index for choice in whole.choices] == list(range(2 * asked["n"]))
    assert ("stop" in {choice.finish_reason for choice in whole.choices}) == ("stop" in asked)
    assert whole.usage is not None
    assert whole.usage.completion_tokens >= len(whole.choices)


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"n{asked['n']}-" + "-".join(list(asked)[1:]))
def test_a_stream_adds_up_to_the_whole_chat(engine: Service, asked: dict[str, Any]) -> None:
    client = engine.client()
    logprobs = {"logprobs": True, "top_logprobs": asked["logprobs"]} if "logprobs" in asked else {}
    request: dict[str, Any] = {
        "model": "rank16",
        "messages": MESSAGES,
        "seed": 5,
        "max_tokens": 16,
        **asked,
        **logprobs,
    }
    whole = client.chat.completions.create(**request)
    ChatCompletion.model_validate(whole.model_dump(), strict=True)
    *chunks, last = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    for chunk in (*chunks, last):
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.usage for chunk in chunks} == {None}
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert [part.delta.role for part in parts] == ["assistant", *[None] * (len(parts) - 1)]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts] == [*[None] * (len(parts) - 1), choice.finish_reason]
        found = [entry for part in parts if part.logprobs for entry in part.logprobs.content or []]
        assert found == ((choice.logprobs and choice.logprobs.content) or [])
    assert ("stop" in {choice.finish_reason for choice in whole.choices}) == ("stop" in asked)


def test_answers_are_reproducible(engine: Service) -> None:
    """Answer i of seed s is answer 0 of seed s + i, alone or among others, whole or streamed."""
    client = engine.client()
    request: dict[str, Any] = {"model": "rank16", "prompt": "The", "temperature": 1.3, "presence_penalty": 0.5}
    together = [choice.text for choice in client.completions.create(**request, n=4, seed=7).choices]
    alone = [client.completions.create(**request, seed=7 + i).choices[0].text for i in range(4)]
    assert together == alone
    assert len(set(alone)) == 4
    streamed = client.completions.create(**request, seed=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == alone[2]


def test_min_tokens_and_ignore_eos(engine: Service) -> None:
    """The end token is forced by a bias: it ends the answer, unless it may not yet or does not count."""
    assert engine.prompts.tokenizer is not None
    end = engine.prompts.tokenizer.eos_token_id
    request: dict[str, Any] = {"model": BASE_ID, "prompt": "The", "temperature": 0, "max_tokens": 9}
    request["logit_bias"] = {str(end): 100}

    def ask(**extra: Any) -> tuple[int, str]:
        reply = engine.client().completions.create(**request, extra_body={"return_token_ids": True, **extra})
        choice: Any = reply.choices[0]
        assert (choice.token_ids[-1] == end) == (choice.finish_reason == "stop" or "ignore_eos" in extra)
        return len(choice.token_ids), choice.finish_reason

    assert ask() == (1, "stop")
    assert ask(min_tokens=4) == (5, "stop")
    assert ask(ignore_eos=True) == (9, "length")


def test_special_tokens_in_the_text(engine: Service) -> None:
    """A bias forces the end token; the tokenizer says how it reads."""
    tokenizer = engine.prompts.tokenizer
    assert tokenizer is not None
    end = tokenizer.eos_token_id
    request: dict[str, Any] = {"model": BASE_ID, "prompt": "The", "temperature": 0, "max_tokens": 3}
    request["logit_bias"] = {str(end): 100}

    def text_of(**extra: Any) -> str:
        whole: str = engine.client().completions.create(**request, extra_body=extra).choices[0].text
        chunks = engine.client().completions.create(**request, extra_body=extra, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole
        return whole

    shown = tokenizer.decode([end] * 3, skip_special_tokens=False)
    assert text_of(ignore_eos=True) == ""
    assert text_of(ignore_eos=True, skip_special_tokens=False) == shown != ""
    assert text_of(skip_special_tokens=False) == ""
    # As vLLM has it, the end token counts as what stopped the answer.
    assert text_of(skip_special_tokens=False, include_stop_str_in_output=True) == tokenizer.decode([end])


def test_the_stop_stays_in_the_text(engine: Service) -> None:
    request: dict[str, Any] = {"model": BASE_ID, "prompt": "The quick", "seed": 3, "max_tokens": 40}
    extra = {"ignore_eos": True, "return_token_ids": True}
    plain: Any = engine.client().completions.create(**request, extra_body=extra).choices[0]
    stop = plain.text[4:6]
    whole = plain.text[: plain.text.index(stop)]
    stopped = engine.client().completions.create(**request, stop=stop, extra_body=extra).choices[0].text
    kept = extra | {"include_stop_str_in_output": True}
    assert (stopped, whole + stop) == (
        whole,
        engine.client().completions.create(**request, stop=stop, extra_body=kept).choices[0].text,
    )
    tokenizer = engine.prompts.tokenizer
    assert tokenizer is not None
    place = next(i for i, token in enumerate(plain.token_ids) if i > 2 and tokenizer.decode([token]).isascii())
    token = plain.token_ids[place]
    by_token = kept | {"stop_token_ids": [token]}
    ended: Any = engine.client().completions.create(**request, extra_body=by_token).choices[0]
    assert ended.token_ids == plain.token_ids[: plain.token_ids.index(token) + 1]
    assert ended.text == tokenizer.decode(ended.token_ids)


@pytest.mark.parametrize("model", MODELS)
def test_prompt_logprobs_are_pefts(engine: Service, shelf: Shelf, model: str) -> None:
    prompt = list(random_prompt(23, 4))
    expected = prompt_logprobs_with_peft(shelf.base, folder_of(shelf, model), prompt)
    expected = expected[: len(prompt) - 1]
    for logprobs in (None, 1):
        reply: Any = engine.client().completions.create(
            model=model, prompt=prompt, logprobs=logprobs, extra_body={"prompt_logprobs": 3}, **GREEDY
        )
        first, *others = reply.choices[0].prompt_logprobs
        assert first is None
        assert_logprobs(
            [entries[str(token)]["logprob"] for token, entries in zip(prompt[1:], others, strict=True)],
            prompt[1:],
            expected,
        )
        ranked = [{entry["rank"]: entry["logprob"] for entry in entries.values()} for entries in others]
        assert_tops([[ranks[rank] for rank in (1, 2, 3)] for ranks in ranked], expected)
        assert (reply.choices[0].logprobs is None) == (logprobs is None)
