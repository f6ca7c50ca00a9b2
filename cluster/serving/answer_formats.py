"""Formats of tool calls and reasoning, by name, for models whose tokenizer brings no response template.

A format has the settings of transformers' ResponseParser, the reader of a call's body, and the grammar that holds a
model to the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import StructTag

from lorafleet.workers.config import ModelConfig
from lorafleet.workers.grammars import COMPACT, adapted

NO_ANCHOR = "(?!)"
"""Matches nowhere: the parser is given only what belongs to the answer."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as the model wrote it."""

    name: str
    arguments: str
    """JSON."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A model's format of tool calls."""

    field: Mapping[str, Any]
    """Of the response template: where the body of one call, or of all of them, begins and ends."""
    read: Callable[[str], list[Call]]
    """The calls in a whole body. Raises ValueError."""
    heads: Sequence[re.Pattern[str]]
    """What stands in a body between the end of one call's arguments and the next one's, whose name it has."""
    begin: str
    """What all calls begin with together, where a grammar writes them."""
    before: str
    """What comes before a call's arguments; NAME stands for the function's name."""
    after: str
    between: str
    end: str
    shows_special_tokens: bool = False
    """Whether its marks are special tokens, which have no text otherwise."""
    has_channels: bool = False
    """Whether thoughts, calls and answers are messages in channels, with special tokens around them: gpt-oss'."""

    @property
    def begins_as_json(self) -> bool:
        """True if only the names of its fields tell a call from an answer in JSON."""
        return (self.begin + self.before).startswith("{")


def _object(value: Any, *keys: str) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call needs a name")
    found: Any = next((value[key] for key in keys if key in value), {})
    return Call(value["name"], found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))


def _read_objects(body: str) -> list[Call]:
    """JSON objects one after another, or a list of them."""
    return [_object(each, "arguments", "parameters") for each in _objects(body)]


def _read_bare_objects(body: str) -> list[Call]:
    """The same without marks around them: an object without arguments is an answer in JSON."""
    objects = _objects(body)
    if not all(isinstance(each, dict) and ("arguments" in each or "parameters" in each) for each in objects):
        raise ValueError("a call without marks needs arguments")
    return [_object(each, "arguments", "parameters") for each in objects]


def _objects(body: str) -> list[Any]:
    decoder, found, at = json.JSONDecoder(), list[Any](), 0
    text = body.strip()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        found += value if isinstance(value, list) else [value]
        while at < len(text) and text[at] in " \r\n\t;,":
            at += 1
    if not found:
        raise ValueError("there is no call")
    return found


_NAMED = re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\{)")


def _read_mistral(body: str) -> list[Call]:
    """A list of objects, or a name with its arguments, as later models write it."""
    named = _NAMED.match(body)
    if named is None:
        return _read_objects(body)
    arguments = body[named.end() :].strip()
    json.loads(arguments)
    return [Call(named["name"], arguments)]


_DEEPSEEK = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]+?)(?:<｜tool▁sep｜>|\n```json\n)(?P<arguments>.*?)"
    r"(?:\n```)?<｜tool▁call▁end｜>",
    re.DOTALL,
)


def _read_deepseek(body: str) -> list[Call]:
    calls = [Call(found["name"], found["arguments"].strip()) for found in _DEEPSEEK.finditer(body)]
    if not calls:
        raise ValueError("there is no call")
    for call in calls:
        json.loads(call.arguments)
    return calls


_OBJECT_HEAD = re.compile(
    r"[\s,;\[\]}]*\{\s*\"name\"\s*:\s*\"(?P<name>[\w.-]+)\"\s*,\s*\"(?:arguments|parameters)\"\s*:\s*(?=\{)"
)
_NAMED_HEAD = re.compile(rf"[\s,\]]*{_NAMED.pattern}")
_DEEPSEEK_HEAD = re.compile(
    r"(?:\s|```|<｜tool▁call▁end｜>)*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]+?)"
    r"(?:<｜tool▁sep｜>|\n```json\n)\s*(?=\{)"
)

_TO_FUNCTION = r"to=functions\."
_HARMONY_HEAD = re.compile(
    rf"(?:<\|start\|>assistant)?\s*(?:<\|channel\|>(?:commentary|analysis)\s+)?{_TO_FUNCTION}(?P<name>[\w.-]+)\s*"
    r"(?:<\|channel\|>(?:commentary|analysis))?[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>\s*(?=\{)"
)
"""The recipient stands before the channel or after it."""


def _read_harmony(body: str) -> list[Call]:
    head = _HARMONY_HEAD.match(body)
    if head is None:
        raise ValueError("there is no call")
    arguments = body[head.end() :].strip()
    json.loads(arguments)
    return [Call(head["name"], arguments)]


_HARMONY_MESSAGES: Mapping[str, Any] = {
    "reasoning_content": {
        "open_pattern": rf"(?:<\|start\|>assistant)?<\|channel\|>analysis(?!\s+{_TO_FUNCTION})[^<]*<\|message\|>",
        "close_pattern": r"<\|end\|>",
        "content": "text",
        "repeats": True,
    },
    "said": {
        "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)"
        rf"(?!\s+{_TO_FUNCTION})[^<]*<\|message\|>",
        "close_pattern": r"<\|(?:end|return)\|>",
        "content": "text",
        "repeats": True,
    },
}
"""Fields of the response template beside calls. Content is what stands in no message, and what is `said` in one."""

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat(
        field={"open_pattern": r"\s*<tool_call>", "close": "</tool_call>"},
        read=_read_objects,
        heads=(_OBJECT_HEAD,),
        begin="",
        before='<tool_call>\n{"name": NAME, "arguments": ',
        after="}\n</tool_call>",
        between="\n",
        end="",
    ),
    "llama3_json": ToolFormat(
        field={"open_pattern": r'\A\s*(?:<\|python_tag\|>)?(?=\{\s*"name")'},
        read=_read_bare_objects,
        heads=(_OBJECT_HEAD,),
        begin="",
        before='{"name": NAME, "parameters": ',
        after="}",
        between="; ",
        end="",
    ),
    "mistral": ToolFormat(
        field={"open_pattern": r"\s*\[TOOL_CALLS\]", "close_pattern": r"(?=\[TOOL_CALLS\])"},
        read=_read_mistral,
        heads=(_OBJECT_HEAD, _NAMED_HEAD),
        begin="[TOOL_CALLS][",
        before='{"name": NAME, "arguments": ',
        after="}",
        between=", ",
        end="]",
        shows_special_tokens=True,
    ),
    "deepseek": ToolFormat(
        field={"open_pattern": r"\s*<｜tool▁calls▁begin｜>", "close": "<｜tool▁calls▁end｜>"},
        read=_read_deepseek,
        heads=(_DEEPSEEK_HEAD,),
        begin="<｜tool▁calls▁begin｜>",
        before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        after="\n```<｜tool▁call▁end｜>",
        between="\n",
        end="<｜tool▁calls▁end｜>",
        shows_special_tokens=True,
    ),
    "harmony": ToolFormat(
        field={
            "open_pattern": rf"(?=(?:<\|start\|>assistant)?\s*{_TO_FUNCTION}[\w.-]+\s*<\|channel\|>"
            rf"|(?:<\|start\|>assistant)?<\|channel\|>(?:commentary|analysis)\s+{_TO_FUNCTION})",
            "close_pattern": r"<\|(?:call|end)\|>",
        },
        read=_read_harmony,
        heads=(_HARMONY_HEAD,),
        begin="",
        before="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
        after="",
        between="",
        end="",
        shows_special_tokens=True,
        has_channels=True,
    ),
}
TOOL_FORMATS = {**TOOL_FORMATS, "qwen": TOOL_FORMATS["hermes"]}


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Splits one base's answers into text, reasoning and calls."""

    template: Mapping[str, Any] | None
    """The response template; None: answers are text only."""
    tools: ToolFormat | None = None
    """None: calls cannot be read, or the tokenizer's template reads them."""
    thinks: bool = False
    has_tools: bool = False
    is_the_tokenizers: bool = False

    @property
    def has_channels(self) -> bool:
        """True if an answer stands in a channel, behind its mark."""
        return self.tools is not None and self.tools.has_channels

    @property
    def shows_special_tokens(self) -> bool:
        return self.is_the_tokenizers or (self.tools is not None and self.tools.shows_special_tokens)

    @classmethod
    def of(cls, model: ModelConfig, own: Mapping[str, Any] | None) -> AnswerFormat:
        """Return the formats that the configuration names, else `own`: the tokenizer's response template."""
        if model.tool_parser is None and model.reasoning_parser is None:
            if not own:
                return cls(None)
            owned = own.get("fields", {})
            return cls(own, None, "reasoning_content" in owned, "tool_calls" in owned, True)
        tools = None if model.tool_parser is None else TOOL_FORMATS[model.tool_parser]
        fields: dict[str, Any] = {"content": {"content": "text"}}
        if tools is not None:
            fields["tool_calls"] = {**tools.field, "content": "text", "repeats": True}
        if model.reasoning_parser is not None:
            fields["reasoning_content"] = {
                "open_pattern": r"<think>\n?",
                "close_pattern": r"\s*</think>\s*",
                "content": "text",
            }
        thinks = model.reasoning_parser is not None
        if tools is not None and tools.has_channels:
            fields, thinks = {**fields, **_HARMONY_MESSAGES}, True
        template = {"start_anchor_pattern": NO_ANCHOR, "fields": fields}
        return cls(template, tools, thinks, tools is not None)

    def prefix_of(self, prompt: str) -> str:
        """Return the part of the prompt that the parser reads: the answer's own beginning."""
        if self.is_the_tokenizers:
            return prompt
        if self.has_channels:
            _, mark, begun = prompt.rpartition("<|start|>assistant")
            return begun if mark else ""
        return "<think>\n" if self.thinks and prompt.rstrip().endswith("<think>") else ""


TEXT_ONLY = AnswerFormat(None)
"""Of a base that neither calls tools nor thinks."""

Functions = Sequence[tuple[str, Mapping[str, Any]]]
"""Names, and the schemas of their arguments."""


def calls_grammar(tools: ToolFormat, functions: Functions, *, many: bool) -> str:
    """A grammar in llguidance's Lark of an answer that calls one of the functions, or several."""
    lines = ["one: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, (name, schema) in enumerate(functions):
        lines.append(f"call_{i}: {_text(_before(tools, name))} {_arguments(schema)} {_text(tools.after)}")
    more = f"({_text(tools.between)} one)*" if many and not tools.has_channels else ""
    lines.append(f"calls: {_text(tools.begin)} one {more} {_text(tools.end)}")
    return "\n".join(["%llguidance {}", "start: calls", *lines])


def talk_grammar(tools: ToolFormat, functions: Functions) -> str:
    """A grammar of any text in which each call fits its function's schema."""
    mark = (tools.begin + tools.before).partition("\n")[0].partition("{")[0].rstrip("[").partition("function")[0]
    if mark:
        tags = [
            StructTag(
                trigger=mark,
                begin=tools.begin + _before(tools, name),
                grammar=json.dumps(_object_schema(schema)),
                end=tools.after + tools.end,
            )
            for name, schema in functions
        ]
        return str(StructTag.to_grammar(tags, assume_special=False))
    return calls_grammar(tools, functions, many=True).replace(
        "start: calls", "start: calls | TALK\nTALK: /([^{ \\n\\t](.|\\n)*)?/"
    )


def _before(tools: ToolFormat, name: str) -> str:
    written = json.dumps(name, ensure_ascii=False) if '"name"' in tools.before else name
    return tools.before.replace("NAME", written)


def _text(text: str) -> str:
    """In Lark, with gpt-oss' marks as special tokens."""
    parts = [part for part in _MARK.split(text) if part]
    return " ".join(part if _MARK.fullmatch(part) else json.dumps(part, ensure_ascii=False) for part in parts)


_MARK = re.compile(r"(<\|[a-z]+\|>)")


def _object_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **adapted(schema), "x-guidance": COMPACT}


def _arguments(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(_object_schema(schema))}"
