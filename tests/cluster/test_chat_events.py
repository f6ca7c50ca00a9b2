"""Events of a chat, as the stock client puts them together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.openai.replies import ChatReply
from lorafleet.cluster.openai.requests import ChatBody
from lorafleet.cluster.serving.dispatch import PreparedRequest
from lorafleet.workers.request import GenerateDelta, GenerateRequest
from tests.cluster.fakes import make_prompts
from tests.cluster.test_tools import LAX, OSLO, answers_of


def put_together(deltas: list[tuple[int, str]], **fields: Any) -> ChatCompletion:
    """What the client makes of an answer whose deltas come so: which answer each is of, and its text."""
    prompts = make_prompts()
    prompts.answers = answers_of("hermes", "think_tags")
    body = ChatBody.model_validate(
        {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}], **fields}
    )
    request = GenerateRequest(model="m", prompt=(1, 2), n=body.n)
    timer = RequestMetrics().begin("base")
    reply = ChatReply(body, [PreparedRequest(request, (1, 2), None, prompts.vocabulary, (), timer)], prompts, "id")
    last = {index: at for at, (index, _) in enumerate(deltas)}
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for at, (index, text) in enumerate(deltas):
        delta = GenerateDelta(index, (5,), text, None, "stop" if last[index] == at else None, 2, 0, worker_id="w")
        events = reply.chunk(delta) or b""
        for line in events.decode().splitlines():
            if line:
                state.handle_chunk(ChatCompletionChunk.model_validate(json.loads(line.removeprefix("data: "))))
    return state.get_final_completion()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}])
def test_several_answers_may_begin_in_any_order(order: tuple[int, ...], options: dict[str, Any]) -> None:
    deltas = [(index, f"{word}{index} ") for word in ("a", "b") for index in order]
    made = put_together(deltas, n=3, **options)
    assert [choice.message.content for choice in made.choices] == [f"a{n} b{n} " for n in range(3)]
    assert {choice.message.role for choice in made.choices} == {"assistant"}


@pytest.mark.parametrize("n", [1, 2])
def test_the_role_comes_once_where_the_first_delta_has_several_parts(n: int) -> None:
    text = f'<think>\nHm.\n</think>\n\nWait.\n<tool_call>\n{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>'
    made = put_together([(index, each) for index in range(n) for each in (text, "")], n=n, tools=LAX)
    for choice in made.choices:
        assert choice.message.role == "assistant"
        assert (choice.message.content or "").strip() == "Wait."
        assert [call.function.arguments for call in choice.message.tool_calls or []] == [OSLO]
