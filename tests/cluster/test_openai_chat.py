"""POST /v1/chat/completions through the stock client."""

from __future__ import annotations

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.cluster.fakes import VERSIONS, answer_token_ids
from tests.cluster.serving import BASE_ID, Service

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the sky?"}]
RENDERED = "<|bos|>system: Be brief.\nuser: What is the sky?\nassistant:"


def test_whole(service: Service) -> None:
    reply = service.client().chat.completions.with_raw_response.create(model="shout", messages=MESSAGES)
    assert reply.headers["x-lorafleet-version"] == VERSIONS["shout"]
    completion = reply.parse()
    ChatCompletion.model_validate(completion.model_dump(), strict=True)
    assert completion.object == "chat.completion"
    [(_, request)] = service.workers.started
    assert service.prompts.tokenizer is not None
    assert service.prompts.tokenizer.decode(list(request.prompt_token_ids)) == RENDERED
    assert request.prompt_token_ids.count(service.prompts.tokenizer.bos_token_id) == 1
    assert request.sampling.max_tokens is None  # as many as fit
    [choice] = completion.choices
    assert choice.message.role == "assistant"
    assert choice.message.content is not None
    assert choice.message.content.startswith(" aaaa read ")
    assert choice.finish_reason == "stop"


def test_stream_is_the_whole_in_pieces(service: Service) -> None:
    client = service.client()
    whole = client.chat.completions.create(model="shout", messages=MESSAGES)
    chunks = list(
        client.chat.completions.create(
            model="shout",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in pieces[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage == whole.usage


def test_stream_helper_of_the_client(service: Service) -> None:
    with service.client().chat.completions.stream(model="shout", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content is not None
    assert final.choices[0].message.content.endswith("over.")


def test_an_answer_goes_back_as_it_came(service: Service) -> None:
    client = service.client()
    first = client.chat.completions.create(model="shout", messages=MESSAGES)
    history = [*MESSAGES, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    client.chat.completions.create(model="shout", messages=history)
    assert service.prompts.tokenizer is not None
    text = service.prompts.tokenizer.decode(list(service.workers.started[1][1].prompt_token_ids))
    assert text.endswith("over.\nuser: Why?\nassistant:")


def test_logprobs(service: Service) -> None:
    completion = service.client().chat.completions.create(
        model=BASE_ID,
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=3,
    )
    ChatCompletion.model_validate(completion.model_dump(), strict=True)
    choice = completion.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    utf8 = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert utf8.decode() == choice.message.content
    assert {len(token.top_logprobs) for token in choice.logprobs.content} == {3}


def test_bounds_of_the_answer(service: Service) -> None:
    client = service.client()
    for bounds, expected in (
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 5, "max_completion_tokens": 4}, 4),
    ):
        reply = client.chat.completions.create(model=BASE_ID, messages=MESSAGES, **bounds)
        assert reply.usage.completion_tokens == expected


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_token_ids(service: Service, stream: bool) -> None:
    reply = service.client().chat.completions.create(
        model=BASE_ID, messages=MESSAGES, stream=stream, extra_body={"return_token_ids": True}
    )
    chunks = list(reply) if stream else [reply]
    [(_, request)] = service.workers.started
    assert chunks[0].prompt_token_ids == list(request.prompt_token_ids)
    made = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    assert made == answer_token_ids(request, service.prompts)


@pytest.mark.slow
async def test_async_client_with_many_answers(service: Service) -> None:
    async with service.async_client() as client:
        stream = await client.chat.completions.create(model=BASE_ID, messages=MESSAGES, n=4, seed=0, stream=True)
        texts = ["", "", "", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [text.partition("seed ")[2][0] for text in texts] == ["0", "1", "2", "3"]
