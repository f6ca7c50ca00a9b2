"""POST /v1/responses through OpenAI's client: it says what a chat with the same conversation says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.responses import Response

from lorafleet.cluster.errors import StreamBroken
from tests.cluster.serving import BASE_ID, Service, serving
from tests.cluster.test_messages import CALLING, CHAT_TOOLS, agent_service
from tests.cluster.test_tools import OSLO, PARAMETERS, ROME, answers_of, said

TOOLS: Any = [
    {"type": "function", "name": "weather", "description": "Of a city.", "parameters": PARAMETERS, "strict": False}
]


def asked(service: Service, *, stream: bool = False, **fields: Any) -> Response:
    fields = {"model": BASE_ID, "input": "Weather?", **fields}
    if not stream:
        return service.client().responses.create(**fields)
    with service.client().responses.stream(**fields) as stream_of:
        events = list(stream_of)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    return last.response


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with agent_service() as running:
        yield running


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_text_and_usage_are_those_of_a_chat(worker_service: Service, stream: bool) -> None:
    chat = worker_service.client().chat.completions.create(
        model="shout",
        messages=[{"role": "system", "content": "Short."}, {"role": "user", "content": "Weather?"}],
        max_tokens=20,
        temperature=0,
    )
    reply = asked(
        worker_service,
        stream=stream,
        model="shout",
        instructions="Short.",
        max_output_tokens=20,
        temperature=0,
        metadata={"a": "b"},
    )
    assert reply.output_text == chat.choices[0].message.content
    assert [item.type for item in reply.output] == ["message"]
    assert (reply.status, reply.model, reply.metadata) == ("incomplete", "shout", {"a": "b"})
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert chat.usage is not None
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (chat.usage.prompt_tokens, 20)
    assert reply.usage.total_tokens == chat.usage.total_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_thoughts_texts_and_calls_are_items(service: Service, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    said(service, monkeypatch, CALLING)
    reply = asked(service, stream=stream, tools=TOOLS)
    thought, text, oslo, rome = reply.output
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item.type for item in reply.output] == kinds
    assert thought.content[0].text == "Hm."
    assert text.content[0].text.strip() == reply.output_text.strip() == "Let me see."
    assert [oslo.arguments, rome.arguments] == [OSLO, ROME]
    assert (oslo.name, reply.status) == ("weather", "completed")
    assert len({item.id for item in reply.output}) == 4


def test_arguments_come_in_pieces(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    said(service, monkeypatch, CALLING)
    pieces: dict[int, list[str]] = {}
    for event in service.client().responses.create(model=BASE_ID, input="Weather?", tools=TOOLS, stream=True):
        if event.type == "response.function_call_arguments.delta":
            pieces.setdefault(event.output_index, []).append(event.delta)
    assert ["".join(texts) for texts in pieces.values()] == [OSLO, ROME]
    assert min(map(len, pieces.values())) > 3


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_answers_that_must_fit_a_schema_do(worker_service: Service, stream: bool) -> None:
    """Over a base of random weights."""
    worker_service.prompts.answers = answers_of("hermes")
    for choice in ("required", {"type": "function", "name": "weather"}):
        reply = asked(worker_service, stream=stream, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        (call,) = reply.output
        assert call.type == "function_call"
        jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    form = {"type": "json_schema", "name": "weather", "schema": PARAMETERS, "strict": True}
    text = asked(worker_service, stream=stream, model="shout", text={"format": form}).output_text
    jsonschema.validate(json.loads(text), PARAMETERS)


def test_a_conversation_is_the_prompt_that_a_chat_makes_of_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer's own items go back as they came, as agents send them."""
    said(service, monkeypatch, CALLING)
    first = asked(service, tools=TOOLS)
    calls: Any = [item for item in first.output if item.type == "function_call"]
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "rain"},
        {"type": "function_call_output", "call_id": calls[1].call_id, "output": "sun"},
        {"role": "developer", "content": "Be brief."},
    ]
    chat: Any = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": first.output_text,
            "tool_calls": [
                {"id": call.call_id, "type": "function", "function": {"name": "weather", "arguments": call.arguments}}
                for call in calls
            ],
        },
        {"role": "tool", "tool_call_id": calls[0].call_id, "content": "rain"},
        {"role": "tool", "tool_call_id": calls[1].call_id, "content": "sun"},
        {"role": "developer", "content": "Be brief."},
    ]
    asked(service, input=items, instructions="Short.", tools=TOOLS, reasoning={"effort": "low", "summary": "auto"})
    service.client().chat.completions.create(model=BASE_ID, messages=chat, tools=CHAT_TOOLS, reasoning_effort="low")
    (_, one), (_, other) = service.workers.started[-2:]
    assert one.prompt_token_ids == other.prompt_token_ids


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"extra_body": {"wings": 2}}, "wings"),
    ],
    ids=["previous", "empty", "background", "truncation", "tokens", "tool", "no-tools", "unknown-choice", "unknown"],
)
def test_refusals_name_the_field(service: Service, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        asked(service, **fields)
    assert found.value.param == param


def test_other_errors() -> None:
    with serving(Service()) as service:
        with pytest.raises(openai.NotFoundError):
            asked(service, model="nobody")
        service.workers.fail = lambda worker_id, num_sent: StreamBroken("lost") if num_sent == 2 else None
        with pytest.raises(openai.InternalServerError, match="lost"):
            asked(service)
        events = list(service.client().responses.create(model=BASE_ID, input="Hi", stream=True))
    assert (events[-1].type, events[-1].message) == ("error", "lost")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_only_the_item_that_was_cut_off_is_incomplete(
    service: Service, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    said(service, monkeypatch, CALLING)
    assert service.prompts.tokenizer is not None
    num_tokens = len(service.prompts.tokenizer(CALLING[: CALLING.rindex("days")])["input_ids"])
    reply = asked(service, stream=stream, tools=TOOLS, max_output_tokens=num_tokens)
    assert reply.status == "incomplete"
    assert [item.status for item in reply.output] == ["completed"] * (len(reply.output) - 1) + ["incomplete"]
    assert len(reply.output) == 4


def test_nulls_are_taken_for_what_is_not_there(service: Service) -> None:
    tool: Any = {"type": "function", "name": "now", "parameters": None}
    asked(service, input=[{"type": None, "role": "user", "content": "Weather?"}], tools=[tool])
    chat: Any = {"type": "function", "function": {"name": "now", "parameters": None}}
    service.client().chat.completions.create(
        model=BASE_ID, messages=[{"role": "user", "content": "Weather?"}], tools=[chat]
    )
    (_, one), (_, other) = service.workers.started[-2:]
    assert one.prompt_token_ids == other.prompt_token_ids
