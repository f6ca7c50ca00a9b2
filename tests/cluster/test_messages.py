"""POST /v1/messages through Anthropic's own client: it says what a chat with the same conversation says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import jsonschema
import pytest

from lorafleet.cluster.errors import StreamBroken
from lorafleet.cluster.http.auth import Keys
from tests.cluster.serving import BASE_ID, Service, serving
from tests.cluster.test_chat_history import TEMPLATE
from tests.cluster.test_tools import OSLO, PARAMETERS, ROME, answers_of, said

USER: Any = {"role": "user", "content": "Weather?"}
TOOLS: Any = [{"name": "weather", "description": "Of a city.", "input_schema": PARAMETERS}]
CHAT_TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}}
]
CALLING = (
    f'<think>\nHm.\n</think>\n\nLet me see.\n<tool_call>\n{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>'
)


def client_of(service: Service, **options: Any) -> anthropic.Anthropic:
    options = {"api_key": "secret", "max_retries": 0, "timeout": 20, **options}
    return anthropic.Anthropic(base_url=service.url, **options)


def asked(service: Service, *, stream: bool = False, **fields: Any) -> anthropic.types.Message:
    fields = {"model": BASE_ID, "messages": [USER], "max_tokens": 300, **fields}
    if "temperature" in fields:  # which the client no longer knows, and its models no longer take
        fields["extra_body"] = {"temperature": fields.pop("temperature")}
    if not stream:
        return client_of(service).messages.create(**fields)
    with client_of(service).messages.stream(**fields) as events:
        return events.get_final_message()


@contextmanager
def agent_service() -> Iterator[Service]:
    """Serve a model that thinks and calls, in the form of Hermes."""
    service = Service()
    assert service.prompts.tokenizer is not None
    service.prompts.tokenizer.chat_template = TEMPLATE
    service.prompts.answers = answers_of("hermes", "think_tags")
    with serving(service) as running:
        yield running


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with agent_service() as running:
        yield running


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_text_and_usage_are_those_of_a_chat(worker_service: Service, stream: bool) -> None:
    chat = worker_service.client().chat.completions.create(
        model="shout", messages=[{"role": "system", "content": "Short."}, USER], max_tokens=20, temperature=0
    )
    message = asked(worker_service, stream=stream, model="shout", system="Short.", max_tokens=20, temperature=0)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == chat.choices[0].message.content
    assert (message.role, message.stop_reason, message.model) == ("assistant", "max_tokens", "shout")
    assert chat.usage is not None
    cached = message.usage.cache_read_input_tokens or 0
    assert (message.usage.input_tokens + cached, message.usage.output_tokens) == (chat.usage.prompt_tokens, 20)
    counted = client_of(worker_service).messages.count_tokens(model="shout", system="Short.", messages=[USER])
    assert counted.input_tokens == chat.usage.prompt_tokens


def test_the_models_length_bounds_an_answer(worker_service: Service) -> None:
    """Clients write bounds of models that are longer than this one."""
    message = asked(worker_service, system="word " * 80, max_tokens=32_000, temperature=0)
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) + usage.output_tokens == 512
    assert message.stop_reason == "max_tokens"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_sequences(worker_service: Service, stream: bool) -> None:
    whole = asked(worker_service, temperature=0, max_tokens=30).content[0].text
    stop = whole[10:12]
    message = asked(worker_service, stream=stream, temperature=0, max_tokens=30, stop_sequences=[stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == whole[: whole.index(stop)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_thoughts_texts_and_calls_are_blocks(service: Service, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    said(service, monkeypatch, CALLING)
    message = asked(service, stream=stream, tools=TOOLS)
    thought, text, oslo, rome = message.content
    assert (thought.type, text.type, oslo.type, rome.type) == ("thinking", "text", "tool_use", "tool_use")
    assert (thought.thinking, text.text.strip()) == ("Hm.", "Let me see.")
    assert [oslo.input, rome.input] == [json.loads(OSLO), json.loads(ROME)]
    assert (oslo.name, message.stop_reason) == ("weather", "tool_use")
    assert oslo.id != rome.id


def test_input_comes_in_pieces(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    said(service, monkeypatch, CALLING)
    pieces: dict[int, list[str]] = {}
    with client_of(service).messages.stream(model=BASE_ID, messages=[USER], max_tokens=300, tools=TOOLS) as events:
        for event in events:
            if event.type == "content_block_delta" and event.delta.type == "input_json_delta":
                pieces.setdefault(event.index, []).append(event.delta.partial_json)
    assert ["".join(texts) for texts in pieces.values()] == [OSLO, ROME]
    assert min(map(len, pieces.values())) > 3


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_calls_that_must_come_fit_their_schemas(worker_service: Service, stream: bool) -> None:
    """Over a base of random weights, which never called a tool."""
    worker_service.prompts.answers = answers_of("hermes")
    for choice in ({"type": "tool", "name": "weather"}, {"type": "any", "disable_parallel_tool_use": True}):
        message = asked(worker_service, stream=stream, model="shout", tools=TOOLS, tool_choice=choice)
        (call,) = message.content
        assert call.type == "tool_use"
        jsonschema.validate(call.input, PARAMETERS)
    format_ = {"type": "json_schema", "schema": PARAMETERS}
    answer = asked(worker_service, stream=stream, extra_body={"output_config": {"format": format_}}).content[0]
    jsonschema.validate(json.loads(answer.text), PARAMETERS)


def test_a_conversation_is_the_prompt_that_a_chat_makes_of_it(service: Service) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": json.loads(OSLO)},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": json.loads(ROME)},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "So?"},
            ],
        },
        {"role": "user", "content": "Well?"},
    ]
    chat: Any = [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "Let me see.",
            "tool_calls": [
                {"id": id_, "type": "function", "function": {"name": "weather", "arguments": arguments}}
                for id_, arguments in (("t1", OSLO), ("t2", ROME))
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "sun"},
        {"role": "user", "content": "So?\nWell?"},
    ]
    system: Any = [{"type": "text", "text": text} for text in "ab"]
    asked(service, messages=messages, system=system, tools=TOOLS, thinking={"type": "disabled"})
    service.client().chat.completions.create(
        model=BASE_ID,
        messages=chat,
        tools=CHAT_TOOLS,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    (_, one), (_, other) = service.workers.started[-2:]
    assert one.prompt_token_ids == other.prompt_token_ids


def test_an_answer_goes_on_with_the_last_message(service: Service) -> None:
    asked(service, messages=[USER, {"role": "assistant", "content": "It rains"}])
    assert service.prompts.tokenizer is not None
    text = service.prompts.tokenizer.decode(list(service.workers.started[-1][1].prompt_token_ids))
    assert text.endswith("<assistant>It rains")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "not in tools"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"extra_body": {"mcp_servers": [{"name": "a"}]}}, "mcp_servers is not supported"),
        ({"extra_body": {"wings": 2}}, "wings is not a known field"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]},
            "tool_result",
        ),
    ],
    ids=["empty", "no-tokens", "image", "server-tool", "unknown-choice", "no-tools", "mcp", "unknown", "open-call"],
)
def test_refusals_name_the_field(service: Service, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as found:
        asked(service, **fields)
    body: Any = found.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert words in body["error"]["message"]


def test_errors_are_anthropics() -> None:
    with serving(Service(keys=Keys(api_keys=("secret",)))) as service:
        assert asked(service).type == "message"
        assert client_of(service, api_key=None, auth_token="secret").messages.count_tokens(
            model=BASE_ID, messages=[USER]
        )
        with pytest.raises(anthropic.AuthenticationError):
            client_of(service, api_key="wrong").messages.create(model=BASE_ID, messages=[USER], max_tokens=1)
        with pytest.raises(anthropic.NotFoundError):
            asked(service, model="nobody")
        service.workers.fail = lambda worker_id, num_sent: StreamBroken("lost") if num_sent == 2 else None
        with pytest.raises(anthropic.APIStatusError, match="lost"):
            asked(service, stream=True)


def test_turns_of_one_role_are_one_and_system_turns_stay_where_they_are(service: Service) -> None:
    first: Any = {"role": "assistant", "content": [{"type": "text", "text": "It rains"}]}
    messages: Any = [
        USER,
        {"role": "system", "content": "Be brief."},
        USER,
        first,
        {"role": "assistant", "content": "in"},
    ]
    tool: Any = {"type": None, "name": "now", "input_schema": {"type": "object"}}
    asked(service, messages=messages, tools=[tool])
    assert service.prompts.tokenizer is not None
    text = service.prompts.tokenizer.decode(list(service.workers.started[-1][1].prompt_token_ids))
    assert text.count("<assistant>") == 1
    assert text.endswith("in")
    assert text.index("<system>Be brief.") > text.index("<user>")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_call_where_only_one_may_come(service: Service, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    said(service, monkeypatch, CALLING)
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = asked(service, stream=stream, tools=TOOLS, tool_choice=choice)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
