"""Tool calls and reasoning through the stock client: parsed from texts, and held to schemas over a worker."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.openai.reading import AnswerReader, Piece, joined
from lorafleet.cluster.openai.requests import ChatBody
from lorafleet.cluster.serving.answer_formats import AnswerFormat, talk_grammar
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.grammars import Grammars
from lorafleet.workers.request import StructuredOutputs
from tests.cluster import fakes
from tests.cluster.fakes import make_prompts
from tests.cluster.serving import BASE_ID, Service, serving
from tests.support.bases import make_tokenizer

MESSAGES: Any = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS: dict[str, Any] = {"weather": PARAMETERS, "now": EMPTY}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
LAX: Any = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
OSLO, ROME = '{"city": "Oslo", "days": 2}', '{"city": "Rome", "days": 1}'
PARSERS = ("hermes", "llama3_json", "mistral", "deepseek")


def answers_of(tool_parser: str | None, reasoning_parser: str | None = None) -> AnswerFormat:
    model = ModelConfig.model_validate(
        {"id": "x", "source": "x", "tool_parser": tool_parser, "reasoning_parser": reasoning_parser}
    )
    return AnswerFormat.of(model, None)


def said(service: Service, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the workers answer this text."""
    tokenizer: Any = service.prompts.tokenizer
    monkeypatch.setattr(fakes, "answer_token_ids", lambda request, prompts: tokenizer(text)["input_ids"])


def collected(service: Service, stream: bool, **fields: Any) -> list[dict[str, Any]]:
    """Content, reasoning, calls and finish reason of each answer."""
    made: Any = service.client().chat.completions.create(
        **{"model": BASE_ID, "messages": MESSAGES, "tools": TOOLS, "stream": stream, **fields}
    )
    found: dict[int, dict[str, Any]] = {}
    for reply in made if stream else [made]:
        for choice in reply.choices:
            one = found.setdefault(choice.index, {"content": "", "thought": "", "calls": [], "reason": None})
            part = choice.delta if stream else choice.message
            one["content"] += part.content or ""
            one["thought"] += getattr(part, "reasoning_content", None) or ""
            for call in part.tool_calls or []:
                if call.id:
                    assert not stream or (call.index == len(one["calls"]) and call.function.arguments == "")
                    one["calls"].append([call.function.name, call.function.arguments])
                else:
                    one["calls"][call.index][1] += call.function.arguments
            one["reason"] = choice.finish_reason or one["reason"]
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("parser", "text", "content"),
    [
        (
            "hermes",
            'Let me see.\n<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>\n<tool_call>\n'
            '{"name": "weather", "arguments": %s}\n</tool_call>',
            "Let me see.",
        ),
        ("llama3_json", '{"name": "weather", "parameters": %s}; {"name": "weather", "parameters": %s}', ""),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": %s}, {"name": "weather", "arguments": %s}]', ""),
        ("mistral", "Hm[TOOL_CALLS]weather[ARGS]%s[TOOL_CALLS]weather%s", "Hm"),
        (
            "deepseek",
            "Hm<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n%s\n```<｜tool▁call▁end｜>\n"
            "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>%s<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "Hm",
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see."
            "<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>%s<|call|>"
            "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>%s",
            "Let me see.",
        ),
    ],
    ids=["hermes", "llama3", "mistral", "mistral-args", "deepseek", "harmony"],
)
def test_formats(monkeypatch: pytest.MonkeyPatch, parser: str, text: str, content: str, stream: bool) -> None:
    service = Service()
    service.prompts.answers = answers_of(parser)
    said(service, monkeypatch, text % (OSLO, ROME))
    with serving(service):
        [answer, other] = collected(service, stream, n=2, tools=LAX)
    assert answer == other
    assert answer["content"].strip() == content
    assert [(name, json.loads(text)) for name, text in answer["calls"]] == [
        ("weather", json.loads(OSLO)),
        ("weather", json.loads(ROME)),
    ]
    assert answer["reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", 'a<tool_call>{"name": "weather", "arguments": %s, "id": 1}</tool_call> b'),
        ("hermes", '<tool_call>[{"name": "weather","arguments": %s} , {"name":"now","arguments":{}}]</tool_call>'),
        ("hermes", '<tool_call>{"arguments": %s, "name": "weather"}</tool_call>'),
        ("llama3_json", '{"name": "weather", "parameters": %s}; {"name": "now", "parameters": {}}'),
        ("mistral", "Hm[TOOL_CALLS]weather[ARGS]%s[TOOL_CALLS]now{}"),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": %s}, {"name": "now", "arguments": {}}]'),
        (
            "deepseek",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n%s\n```<｜tool▁call▁end｜>\n"
            "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>a <b> to=functions.x\n<|end|><|start|>assistant<|channel|>analysis "
            "to=python code<|message|>1<|end|><|start|>assistant to=functions.weather<|channel|>commentary json"
            "<|message|>%s<|end|><|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json"
            "<|message|>{}<|call|>"
            "<|start|>assistant<|channel|>final<|message|>to=functions.x {} <|return|>",
        ),
        ("hermes", '<tool_call>{"name": "weather", "arguments": %s'),
        ("hermes", "<tool_call>{broken: %s}</tool_call>"),
    ],
    ids=[
        "hermes",
        "list",
        "name-last",
        "llama3",
        "mistral-args",
        "mistral",
        "deepseek",
        "harmony",
        "cut-off",
        "broken",
    ],
)
def test_pieces_of_any_length_are_read_alike(parser: str, text: str) -> None:
    text %= '{"city": "{\\"}\\\\", "in": {"a": [{}]}}'
    answers = answers_of(parser)

    def read(length: int) -> list[Piece]:
        reader = AnswerReader(answers, "", tools=TOOLS, reads_calls=True)
        found: list[Piece] = []
        for at in range(0, len(text), length):
            found += reader.feed(text[at : at + length], is_last=at + length >= len(text))
        return joined(found)

    whole = read(len(text))
    kinds = [piece.kind for piece in whole if piece.kind not in ("content", "reasoning")]
    assert kinds[:2] in ([], ["call", "arguments"])
    for piece in whole:
        if piece.kind == "arguments":
            json.loads(piece.text)
    for length in range(1, 30):
        assert read(length) == whole


def test_arguments_are_streamed_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    service.prompts.answers = answers_of("hermes")
    said(service, monkeypatch, f'<tool_call>{{"name": "weather", "arguments": {OSLO}}}</tool_call>')
    with serving(service):
        pieces = [
            call.function.arguments
            for chunk in service.client().chat.completions.create(
                model=BASE_ID, messages=MESSAGES, tools=TOOLS, stream=True
            )
            for call in chunk.choices[0].delta.tool_calls or []
            if call.function is not None
        ]
    assert "".join(text or "" for text in pieces) == OSLO
    assert len(pieces) > 5


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_reasoning(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    service = Service()
    service.prompts.answers = answers_of("hermes", "think_tags")
    said(service, monkeypatch, "<think>\nHm, <b>.\n</think>\n\nFine.")
    with serving(service):
        [answer] = collected(service, stream, tools=[])
        [with_tools] = collected(service, stream)
        [without] = collected(service, stream, extra_body={"include_reasoning": False})
    assert answer == with_tools == {"content": "Fine.", "thought": "Hm, <b>.", "calls": [], "reason": "stop"}
    assert without == answer | {"thought": ""}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_channels(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """As gpt-oss writes: its end tokens are no part of the text."""
    service = Service()
    service.prompts.answers = answers_of("harmony")
    thought = "<|channel|>analysis<|message|>Hm, <b>.<|end|><|start|>assistant"
    with serving(service):
        said(service, monkeypatch, f"{thought}<|channel|>final<|message|>Fine: {{}}.")
        [answer] = collected(service, stream, tools=[])
        [with_tools] = collected(service, stream, tools=LAX)
        [without] = collected(service, stream, tools=LAX, extra_body={"include_reasoning": False})
        said(service, monkeypatch, f"{thought}<|channel|>commentary to=functions.now json<|message|>{{}}")
        [called] = collected(service, stream, tools=LAX)
        said(service, monkeypatch, "It goes on.")
        body: Any = {"add_generation_prompt": False, "continue_final_message": True}
        messages = [*MESSAGES, {"role": "assistant", "content": "So:"}]
        [continued] = collected(service, stream, messages=messages, tools=LAX, extra_body=body)
    assert answer == with_tools == {"content": "Fine: {}.", "thought": "Hm, <b>.", "calls": [], "reason": "stop"}
    assert without == answer | {"thought": ""}
    assert called == {"content": "", "thought": "Hm, <b>.", "calls": [["now", "{}"]], "reason": "tool_calls"}
    assert continued["content"] == "It goes on."


@pytest.mark.parametrize(
    ("fields", "thought"),
    [
        ({}, "may_come"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": None}, "may_come"),
        ({"chat_template_kwargs": {"begun": True}}, "begun"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None),
        ({"reasoning_effort": "none"}, None),
    ],
    ids=["format", "calls", "begun", "switched-off", "no-effort"],
)
def test_what_must_come_comes_after_the_thought(fields: dict[str, Any], thought: str | None) -> None:
    service = Service()
    service.prompts.answers = answers_of("hermes", "think_tags")
    assert service.prompts.tokenizer is not None
    service.prompts.tokenizer.chat_template = "{{ messages[0].content }}{% if begun %}<think>\n{% endif %}"
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    body = {"model": BASE_ID, "messages": MESSAGES, "max_tokens": 9, "response_format": format_, **fields}
    with serving(service), service.http() as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    outputs = service.workers.started[-1][1].sampling.structured_outputs
    assert outputs.thought == thought


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_is_no_call_is_content(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    service = Service()
    service.prompts.answers = answers_of("hermes")
    said(service, monkeypatch, "So: <tool_call>{broken</tool_call> <tool")
    with serving(service):
        [answer] = collected(service, stream)
    assert answer["content"].replace(" ", "") == "So:{broken<tool"
    assert (answer["calls"], answer["reason"]) == ([], "stop")


def test_tools_are_refused_where_nobody_reads_them(service: Service) -> None:
    with service.http() as http:
        body = {"model": BASE_ID, "messages": MESSAGES, "tools": TOOLS}
        reply = http.post("/v1/chat/completions", json=body)
        assert http.post("/v1/chat/completions", json=body | {"tool_choice": "none"}).status_code == 200
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "tools"
    assert "model.tool_parser" in reply.json()["error"]["message"]
    with pytest.raises(ValueError, match="tool_parser"):
        answers_of("unheard_of")


def test_choices_that_cannot_be() -> None:
    service = Service()
    service.prompts.answers = answers_of("hermes")
    with serving(service), service.http() as http:
        for fields in (
            {"tool_choice": "required"},
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nothing"}}},
        ):
            reply = http.post("/v1/chat/completions", json={"model": BASE_ID, "messages": MESSAGES, **fields})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")


def fit(calls: list[list[str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("parser", PARSERS)
def test_calls_that_must_come_fit_their_schemas(worker_service: Service, parser: str, stream: bool) -> None:
    """Over a base of random weights, which never called a tool."""
    worker_service.prompts.answers = answers_of(parser)
    fields = {"model": "shout", "n": 3, "seed": 5, "max_tokens": 300}
    for answer in collected(worker_service, stream, tool_choice="required", parallel_tool_calls=False, **fields):
        assert len(answer["calls"]) == 1
        assert (answer["content"], answer["reason"]) == ("", "tool_calls")
        fit(answer["calls"])
    named = {"type": "function", "function": {"name": "weather"}}
    for answer in collected(worker_service, stream, tool_choice=named, **fields):
        assert [name for name, _ in answer["calls"]] == ["weather"]
        fit(answer["calls"])


@pytest.mark.parametrize("parser", PARSERS)
def test_strict_calls_fit_where_they_come(parser: str) -> None:
    """The grammar takes a good call anywhere in a text and refuses a bad one, whatever the format."""
    tools = answers_of(parser).tools
    assert tools is not None
    prompts: Prompts = make_prompts()
    tokenizer: Any = prompts.tokenizer
    grammars = Grammars(tokenizer, vocab_size=prompts.vocab_size)
    source = talk_grammar(tools, list(SCHEMAS.items()))
    before, after = (
        tools.begin + tools.before.replace("NAME", '"weather"' if '"name"' in tools.before else "weather"),
        tools.after,
    )
    talk = "" if parser == "llama3_json" else "Hm. "
    for arguments, is_good in ((OSLO, True), ('{"city": "Nowhere"', False)):
        matcher = grammars.matcher(StructuredOutputs(grammar=source))
        for token_id in tokenizer(f"{talk}{before}{arguments}{after if is_good else ''}")["input_ids"]:
            matcher.take(token_id)
        assert (matcher.error is None) == is_good, (arguments, matcher.error)


FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": EMPTY}}
THOUGHT, FINAL = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant", "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>%s"
TAGGED = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
WRONG = '{"city": "Nowhere"}'


@pytest.mark.parametrize(
    ("parser", "fields", "good", "bad"),
    [
        ("harmony", {"tools": TOOLS, "tool_choice": "required"}, [CALL % OSLO], [FINAL, CALL % WRONG, "Hm"]),
        ("harmony", {"response_format": FORMAT}, [FINAL + "{}"], ["{}", FINAL + "Hm", CALL % OSLO]),
        ("harmony", {"tools": TOOLS}, [FINAL + "Hm {", CALL % OSLO], [CALL % WRONG, "Hm"]),
        (
            "harmony",
            {"tools": TOOLS, "response_format": FORMAT},
            [FINAL + "{}", CALL % ROME],
            [CALL % WRONG, FINAL + "H"],
        ),
        ("hermes", {"tools": TOOLS, "response_format": FORMAT}, ["{}", TAGGED % OSLO], [TAGGED % WRONG, "Hm", "[]"]),
        ("hermes", {"tools": LAX, "response_format": FORMAT}, ["{}", TAGGED % WRONG], [TAGGED % "[]", "Hm"]),
        ("hermes", {"tools": TOOLS, "response_format": FORMAT, "tool_choice": "none"}, ["{}"], [TAGGED % OSLO]),
        ("hermes", {"tools": TOOLS, "response_format": FORMAT, "tool_choice": "required"}, [TAGGED % OSLO], ["{}"]),
        ("llama3_json", {"tools": LAX, "response_format": FORMAT}, ["{}"], ["Hm"]),
    ],
)
def test_an_answer_is_a_call_or_what_it_must_be(parser: str, fields: Any, good: list[str], bad: list[str]) -> None:
    tokenizer: Any = make_tokenizer()
    names = ("start", "end", "channel", "message", "constrain", "call", "return")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    end: int = tokenizer.convert_tokens_to_ids("<|return|>")
    body = ChatBody.model_validate({"model": "m", "messages": MESSAGES, **fields})
    outputs = body.request(answers_of(parser)).structured_outputs
    assert outputs is not None
    grammars = Grammars(tokenizer, vocab_size=len(tokenizer), stop_token_ids=[end])
    thoughts = ("", THOUGHT, THOUGHT * 2) if parser == "harmony" else ("",)
    for text, is_good in [(thought + text, text in good) for thought in thoughts for text in (*good, *bad)]:
        matcher = grammars.matcher(outputs)
        for token_id in (*tokenizer(text)["input_ids"], end):
            if matcher.error is None:
                matcher.take(token_id)
        assert (matcher.error is None and matcher.is_over) == is_good, (text, matcher.error)


def test_calls_that_look_like_the_answer_exclude_it() -> None:
    body = ChatBody.model_validate({"model": "m", "messages": MESSAGES, "tools": TOOLS, "response_format": FORMAT})
    with pytest.raises(BadRequest, match="exclude each other"):
        body.request(answers_of("llama3_json"))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_call_or_an_answer_over_a_base_of_random_weights(worker_service: Service, stream: bool) -> None:
    worker_service.prompts.answers = answers_of("hermes")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    fields = {"model": "shout", "n": 8, "seed": 5, "max_tokens": 300, "response_format": schema}
    answers = collected(worker_service, stream, parallel_tool_calls=False, **fields)
    for answer in answers:
        if answer["calls"]:
            fit(answer["calls"])
        else:
            jsonschema.validate(json.loads(answer["content"]), PARAMETERS)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "json_object"}}], ids=["free", "held to JSON"])
def test_an_answer_in_json_that_has_a_name_is_no_call(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], stream: bool
) -> None:
    service = Service()
    service.prompts.answers = answers_of("llama3_json")
    text = '{"name": "Bob", "age": 3}' if not fields else '{"name": "Bob", "arguments": {"age": 3}}'
    said(service, monkeypatch, text)
    with serving(service):
        [answer] = collected(service, stream, tools=LAX, **fields)
    assert answer == {"content": text, "thought": "", "calls": [], "reason": "stop"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_calls_behind_the_first_are_dropped_where_only_one_may_come(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    service = Service()
    service.prompts.answers = answers_of("hermes")
    call = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>\n'
    said(service, monkeypatch, f"Wait. {call % OSLO}{call % ROME}")
    with serving(service):
        [answer] = collected(service, stream, tools=LAX, parallel_tool_calls=False)
    assert (answer["content"].strip(), answer["calls"]) == ("Wait.", [["weather", OSLO]])


TEMPLATE = {
    "start_anchor": "<assistant>",
    "fields": {
        "content": {"content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": '{"type": "function", "function": {"name": content.name, "arguments": content.arguments}}',
        },
    },
}
"""How a tokenizer of its own says to read calls."""


@pytest.mark.parametrize(
    "text",
    [
        "Hello. <tool_call>{broken</tool_call> bye",
        'Hello. <tool_call>{"nom": 1}</tool_call> bye',
        'Hello. <tool_call>{"name": "weather", "argu',
    ],
    ids=["no JSON", "no name", "cut off"],
)
@pytest.mark.parametrize("length", [1, 5, 1000])
def test_what_the_tokenizers_template_cannot_read_is_content(text: str, length: int) -> None:
    answers = AnswerFormat.of(ModelConfig(id="x", source="x"), TEMPLATE)
    reader = AnswerReader(answers, "Hi<assistant>", tools=LAX, reads_calls=True)
    found: list[Piece] = []
    for at in range(0, len(text), length):
        found += reader.feed(text[at : at + length], is_last=at + length >= len(text))
    assert {piece.kind for piece in found} == {"content"}
    said = "".join(piece.text for piece in found)
    for part in text.replace("<tool_call>", " ").replace("</tool_call>", " ").split():
        assert part in said
