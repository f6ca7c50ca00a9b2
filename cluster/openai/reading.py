"""Splits an answer's text, as it comes, into content, reasoning and tool calls, by transformers' ResponseParser."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing import ResponseParser

from lorafleet.cluster.openai.requests import ChatBody
from lorafleet.cluster.serving.answer_formats import AnswerFormat, Call, ToolFormat
from lorafleet.cluster.serving.dispatch import PreparedRequest
from lorafleet.cluster.serving.prompts import Prompts

_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
"""What transformers' parser raises for a call that the tokenizer's template does not describe."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that was added to one part of an answer."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    """Of a call: the function's name. Its arguments follow, as pieces of the JSON text."""


class AnswerReader:
    """Reads one answer. Without tools and thoughts all of it is content."""

    def __init__(
        self,
        answers: AnswerFormat,
        prompt: str,
        *,
        tools: Sequence[Any],
        reads_calls: bool,
        many: bool = True,
        shows_reasoning: bool = True,
    ) -> None:
        """prompt: the text that the model was given. reads_calls: calls may come; else they are content.

        many: several may; else those behind the first are dropped, as with OpenAI's `parallel_tool_calls=False`.
        """
        self._many = many
        self._num_calls = 0
        self._shows_reasoning = shows_reasoning
        self._format = answers
        self._calls = CallReader(answers.tools)
        template = dict(answers.template or {})
        if not reads_calls:
            fields = {name: each for name, each in template.get("fields", {}).items() if name != "tool_calls"}
            template["fields"] = fields
        self._parser = ResponseParser(template, prefix=answers.prefix_of(prompt), tools=list(tools))
        self._is_first = True
        self._is_broken = False
        """True once the tokenizer's own template could not read what came. The rest is content."""

    def feed(self, text: str, *, is_last: bool) -> list[Piece]:
        """Split the next text of the answer into its parts, in order."""
        events = [] if self._format.is_the_tokenizers or not self._is_first else self._parser.initial_events
        first = [event for event in events if event["type"] == "region_chunk" and event["field"] != "reasoning_content"]
        pieces = [Piece("content", event["text"]) for event in first]
        self._is_first = False
        if self._is_broken:
            return joined([Piece("content", text)])
        try:
            events = self._parser.feed(text)
        except _UNREADABLE:
            self._is_broken = True
            return joined([*pieces, Piece("content", self._calls.body + text)])
        try:
            events += self._parser.finalize()[1] if is_last else []
        except _UNREADABLE:
            self._is_broken = True
        for event in events:
            pieces += self._pieces(event)
        if self._is_broken:
            pieces.append(Piece("content", self._calls.body))
        return joined(filter(self._is_shown, pieces))

    def _is_shown(self, piece: Piece) -> bool:
        """Return False for a call that is one too many."""
        self._num_calls += piece.kind == "call"
        return self._many or self._num_calls <= 1 or piece.kind not in ("call", "arguments")

    def _pieces(self, event: dict[str, Any]) -> Iterator[Piece]:
        kind, name = event["type"], event["field"]
        if name != "tool_calls":
            if kind == "region_chunk" and (self._shows_reasoning or name != "reasoning_content"):
                yield Piece("reasoning" if name == "reasoning_content" else "content", event["text"])
        elif kind == "region_open":
            self._calls = CallReader(self._format.tools)
        elif kind == "region_chunk":
            yield from self._calls.feed(event["text"])
        elif self._format.tools is not None:
            yield from self._calls.end()
        else:
            for each in event["value"] if isinstance(event["value"], list) else [event["value"]]:
                function = each.get("function") if isinstance(each, dict) else None
                if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                    yield Piece("content", self._calls.body)
                    return
                arguments = function.get("arguments", {})
                yield Piece("call", function["name"])
                text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                yield Piece("arguments", text)


class TextReader:
    """Reads answers that are nothing but content."""

    def feed(self, text: str, *, is_last: bool) -> list[Piece]:
        """Split the next text of the answer into its parts."""
        return [Piece("content", text)] if text else []


class CallReader:
    """Reads the calls in one region of an answer: a name as soon as it is there, then the arguments as they come."""

    def __init__(self, tools: ToolFormat | None) -> None:
        """tools: None where the tokenizer's template reads calls, each as a whole."""
        self._tools = tools
        self.body = ""
        """All that the region has so far."""
        self._at = 0
        """Where in it the reading stands."""
        self._num_calls = 0
        self._depth = 0
        """Of braces, in the arguments of a call; 0 outside of them."""
        self._in_string = self._is_escaped = False

    def feed(self, text: str) -> Iterator[Piece]:
        """Split the next text of the region into its parts."""
        self.body += text
        while self._tools is not None:
            if not self._depth:
                found = next((found for head in self._tools.heads if (found := head.match(self.body, self._at))), None)
                if found is None:
                    return
                self._num_calls += 1
                self._at = found.end()
                yield Piece("call", found["name"])
            start, self._at = self._at, self._end_of_arguments()
            yield Piece("arguments", self.body[start : self._at])
            if self._depth:
                return

    def _end_of_arguments(self) -> int:
        """Return the end of the arguments, or of the text so far."""
        for at in range(self._at, len(self.body)):
            letter = self.body[at]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped, self._in_string = letter == "\\", letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{}":
                self._depth += 1 if letter == "{" else -1
                if not self._depth:
                    return at + 1
        return len(self.body)

    def end(self) -> Iterator[Piece]:
        """The region has ended: calls that only the whole of it shows. What is no call is content."""
        if self._depth:  # the bound on tokens cut it off
            return
        assert self._tools is not None
        try:
            calls: list[Call] = self._tools.read(self.body)
        except ValueError:
            if not self._num_calls:
                yield Piece("content", self.body)
            return
        for call in calls[self._num_calls :]:
            yield Piece("call", call.name)
            yield Piece("arguments", call.arguments)


def reader_of(body: ChatBody, prepared: PreparedRequest, prompts: Prompts) -> AnswerReader | TextReader:
    """Make the reader of an answer to a conversation."""
    calls, tools = bool(body.tools) and body.choice != "none", prompts.answers.tools
    if calls and body.choice == "auto" and tools is not None and tools.begins_as_json:
        # Held to a form, the answer may look like a call, and cannot be one.
        calls = body.sampling().get("structured_outputs") is None
    if not calls and not prompts.answers.thinks:
        return TextReader()
    # An answer that goes on with the client's own message is none that the model began.
    prompt = prepared.vocabulary.decode(prepared.prompt_token_ids) if body.begins_answer else ""
    return AnswerReader(
        prompts.answers,
        prompt,
        tools=[tool.rendered() for tool in body.tools],
        reads_calls=calls,
        many=body.parallel_tool_calls,
        shows_reasoning=body.include_reasoning,
    )


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece, and none that is empty."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].kind == piece.kind != "call":
            found[-1] = Piece(piece.kind, found[-1].text + piece.text)
        elif piece.text:
            found.append(piece)
    return found


def call_id() -> str:
    """A new id of a call, as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"
