"""POST /v1/completions through the stock client: shapes, streams, logprobs, echo, every kind of prompt."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types import Completion

from tests.cluster.fakes import VERSIONS, answer_token_ids
from tests.cluster.serving import BASE_ID, Service


def expected_text(service: Service, prompt: str, version: str | None = None) -> str:
    assert service.prompts.tokenizer is not None
    num_tokens = len(service.prompts.tokenizer(prompt)["input_ids"])
    return f" {(version or 'base')[:4]} read {num_tokens} tokens, seed None; wörld 🦊 over."


def test_whole(service: Service) -> None:
    reply = service.client().completions.with_raw_response.create(model="shout", prompt="Hello", max_tokens=400)
    assert reply.headers["x-lorafleet-worker"] == "w0"
    assert reply.headers["x-lorafleet-version"] == VERSIONS["shout"]
    completion = reply.parse()
    Completion.model_validate(completion.model_dump(), strict=True)
    assert completion.object == "text_completion"
    assert completion.model == "shout"
    [choice] = completion.choices
    assert choice.text == expected_text(service, "Hello", VERSIONS["shout"])
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert completion.model_extra is not None
    assert completion.model_extra["lorafleet"] == {"worker_id": "w0", "version": VERSIONS["shout"]}
    usage = completion.usage
    assert usage is not None
    [(_, request)] = service.workers.started
    assert usage.prompt_tokens == len(request.prompt_token_ids)
    assert usage.completion_tokens == len(answer_token_ids(request, service.prompts))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2


@pytest.mark.parametrize(
    ("model", "version"),
    [(BASE_ID, None), ("shout", VERSIONS["shout"]), (f"{BASE_ID}:whisper", VERSIONS["whisper"])],
)
def test_model_names(service: Service, model: str, version: str | None) -> None:
    completion = service.client().completions.create(model=model, prompt="Hello", max_tokens=400)
    assert completion.choices[0].text == expected_text(service, "Hello", version)
    assert completion.model == model
    assert service.workers.started[0][1].version == version


def test_sixteen_tokens_by_default_and_fewer_where_they_do_not_fit(service: Service) -> None:
    completion = service.client().completions.create(model=BASE_ID, prompt="Hello")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16
    assert completion.choices[0].finish_reason == "length"
    almost_full = [5] * (service.prompts.max_model_len - 3)
    service.client().completions.create(model=BASE_ID, prompt=almost_full)
    assert service.workers.started[-1][1].prompt_token_ids == tuple(almost_full)


def test_stream_is_the_whole_in_pieces(service: Service) -> None:
    client = service.client()
    whole = client.completions.create(model="shout", prompt="Hello", max_tokens=400)
    chunks = list(
        client.completions.create(
            model="shout", prompt="Hello", max_tokens=400, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert "🦊" in whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in pieces][-2:] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in pieces)
    served = [chunk.model_extra.get("lorafleet") for chunk in pieces if chunk.model_extra]
    assert served == [{"worker_id": "w0", "version": VERSIONS["shout"]}] * 2  # the first and the last


def test_stream_on_the_wire(service: Service) -> None:
    body = {"model": BASE_ID, "prompt": "Hello", "max_tokens": 3, "stream": True}
    with service.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-lorafleet-worker"] == "w0"
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all("usage" not in chunk for chunk in chunks)
    assert len(chunks) == 3


def test_many_prompts_and_answers(service: Service) -> None:
    client = service.client()
    prompts = ["Hello", "The quick brown fox"]
    whole = client.completions.create(model="shout", prompt=prompts, n=3, seed=2**63 - 1, max_tokens=400)
    assert [choice.index for choice in whole.choices] == list(range(6))
    seeds = [request.sampling.seed for _, request in service.workers.started]
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1] * 2
    texts: dict[int, str] = {}
    for chunk in client.completions.create(
        model="shout", prompt=prompts, n=3, seed=2**63 - 1, max_tokens=400, stream=True
    ):
        [choice] = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert whole.usage is not None
    num_prompt_tokens = sum(len(service.workers.started[i][1].prompt_token_ids) for i in (0, 3))
    assert whole.usage.prompt_tokens == num_prompt_tokens


@pytest.mark.parametrize(
    "prompt", [[5, 6, 7], [[5, 6, 7]], "Hello", ["Hello"]], ids=["ids", "id-lists", "text", "texts"]
)
def test_prompt_kinds(service: Service, prompt: list[int] | list[list[int]] | str | list[str]) -> None:
    service.client().completions.create(model=BASE_ID, prompt=prompt)
    [(_, request)] = service.workers.started
    assert service.prompts.tokenizer is not None
    is_text = isinstance(prompt, str) or isinstance(prompt[0], str)
    hello = tuple(service.prompts.tokenizer("Hello")["input_ids"])
    assert request.prompt_token_ids == (hello if is_text else (5, 6, 7))


def test_logprobs(service: Service) -> None:
    client = service.client()
    whole = client.completions.create(model=BASE_ID, prompt="Hello", max_tokens=400, logprobs=2)
    Completion.model_validate(whole.model_dump(), strict=True)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    tokens, offsets, tops = logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs
    assert tokens is not None
    assert offsets is not None
    assert tops is not None
    text = whole.choices[0].text
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    assert any(token.startswith("bytes:") for token in tokens)
    assert all(token in top for token, top in zip(tokens, tops, strict=True))
    assert all(2 <= len(top) <= 3 for top in tops)
    chunks = client.completions.create(model=BASE_ID, prompt="Hello", max_tokens=400, logprobs=2, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in streamed if part for token in part.tokens or []] == tokens
    assert [offset for part in streamed if part for offset in part.text_offset or []] == offsets


def test_no_infinity_in_json(service: Service) -> None:
    reply = service.client().completions.create(model=BASE_ID, prompt="Hello", max_tokens=2, logprobs=20)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert min(logprobs.top_logprobs[0].values()) == -9999.0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_scores_the_prompt_only(service: Service, stream: bool) -> None:
    client = service.client()
    prompt = "The quick brown fox"
    request = {"model": BASE_ID, "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
    if stream:
        [reply] = list(client.completions.create(stream=True, **request))
    else:
        reply = client.completions.create(**request)
        assert reply.usage.completion_tokens == 0
    choice = reply.choices[0]
    assert choice.text == prompt
    assert choice.finish_reason == "length"
    assert "".join(choice.logprobs.tokens) == prompt
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert None not in choice.logprobs.token_logprobs[1:]
    assert choice.logprobs.text_offset[0] == 0


def test_echo_of_token_ids(service: Service) -> None:
    assert service.prompts.tokenizer is not None
    token_ids = service.prompts.tokenizer("Hello fox")["input_ids"]
    reply = service.client().completions.create(model=BASE_ID, prompt=token_ids, echo=True, max_tokens=400)
    assert reply.choices[0].text == "Hello fox" + expected_text(service, "Hello fox")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_token_ids(service: Service, stream: bool) -> None:
    chunks = service.client().completions.create(
        model=BASE_ID, prompt="Hello", max_tokens=400, stream=stream, extra_body={"return_token_ids": True}
    )
    choices = [chunk.choices[0] for chunk in (chunks if stream else [chunks])]
    [(_, request)] = service.workers.started
    assert choices[0].prompt_token_ids == list(request.prompt_token_ids)
    assert [token for choice in choices for token in choice.token_ids] == answer_token_ids(request, service.prompts)


def test_extensions_reach_the_worker(service: Service) -> None:
    service.client().completions.create(
        model=BASE_ID,
        prompt="Hello",
        temperature=0,
        top_p=0.5,
        stop="x",
        seed=4,
        user="me",
        presence_penalty=0.5,
        frequency_penalty=-2,
        logit_bias={"5": -100, "303": 7},
        extra_body={
            "top_k": 7,
            "min_p": 0.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [3],
            "repetition_penalty": 1.1,
        },
    )
    sampling = service.workers.started[0][1].sampling
    assert sampling.model_dump(exclude_unset=False) == {
        "max_tokens": 16,
        "min_tokens": 2,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -2.0,
        "repetition_penalty": 1.1,
        "logit_bias": {5: -100.0, 303: 7.0},
        "seed": 4,
        "stop": ("x",),
        "stop_token_ids": (3,),
        "ignore_eos": True,
        "logprobs": None,
        "prompt_logprobs": False,
        "num_prompt_tops": None,
        "structured_outputs": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
    }


async def test_async_client(service: Service) -> None:
    async with service.async_client() as client:
        stream = await client.completions.create(model="shout", prompt="Hello", max_tokens=400, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == expected_text(service, "Hello", VERSIONS["shout"])


def test_models(service: Service) -> None:
    client = service.client()
    models = {model.id: model for model in client.models.list()}
    assert list(models) == [BASE_ID, "shout", "whisper"]
    for model in models.values():
        openai.types.Model.model_validate(model.model_dump(), strict=True)
    pages = [{"limit": 1}, {"limit": 5, "after": "shout"}, {"after": "whisper"}, {"after": "t"}]
    listed = [[card.id for card in client.models.list(extra_query=page)] for page in pages]
    assert listed == [[BASE_ID, "shout"], ["whisper"], [], ["whisper"]]
    with pytest.raises(openai.BadRequestError):
        client.models.list(extra_query={"limit": 0})
    extra = models["shout"].model_extra
    assert extra is not None
    assert (extra["parent"], extra["root"]) == (BASE_ID, "demo/shout")
    assert (models[BASE_ID].model_extra or {})["parent"] is None
    assert client.models.retrieve(BASE_ID).id == BASE_ID
    assert client.models.retrieve("shout") == models["shout"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"
