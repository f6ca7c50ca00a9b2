"""Splits an answer's text, as it comes, into content, reasoning and tool calls, by transformers' ResponseParser."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from lorafleet.cluster.serving.answer_formats import AnswerFormat, Call


@dataclass(slots=True)
class Reading:
    """What one piece of text brought."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


class AnswerReader:
    """Reads one answer. Without tools and thoughts all of it is content."""

    def __init__(self, answers: AnswerFormat, prompt: str, *, tools: Sequence[Any], reads_calls: bool) -> None:
        """prompt: the text that the model was given. reads_calls: calls may come; else they are content."""
        self._format = answers
        self._reads_calls = reads_calls
        self._body = ""
        self.calls: list[Call] = []
        template = dict(answers.template or {})
        if not reads_calls:
            fields = {name: each for name, each in template.get("fields", {}).items() if name != "tool_calls"}
            template["fields"] = fields
        self._parser = ResponseParser(template, prefix=answers.prefix_of(prompt), tools=list(tools))
        self._is_first = True

    def feed(self, text: str, *, is_last: bool) -> Reading:
        """The next text of the answer."""
        reading = Reading()
        events = self._parser.initial_events if self._is_first else []
        for event in events if not self._format.is_the_tokenizers else []:
            if event["type"] == "region_chunk" and event["field"] != "reasoning_content":
                reading.content += event["text"]
        self._is_first = False
        events = self._parser.feed(text)
        if is_last:
            try:
                events += self._parser.finalize()[1]
            except ValueError:  # what the tokenizer's template cannot read
                reading.content += self._body
        for event in events:
            self._take(event, reading)
        self.calls += reading.calls
        return reading

    def _take(self, event: dict[str, Any], reading: Reading) -> None:
        kind, name = event["type"], event["field"]
        if name == "tool_calls":
            if kind == "region_open":
                self._body = ""
            elif kind == "region_chunk":
                self._body += event["text"]
            else:
                self._end_call(event["value"], reading)
        elif kind == "region_chunk":
            if name == "reasoning_content":
                reading.reasoning += event["text"]
            else:
                reading.content += event["text"]

    def _end_call(self, value: Any, reading: Reading) -> None:
        if self._format.tools is None:
            for each in value if isinstance(value, list) else [value]:
                function = each["function"]
                arguments = function.get("arguments", {})
                text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                reading.calls.append(Call(function["name"], text))
            return
        try:
            reading.calls += self._format.tools.read(self._body)
        except ValueError:
            reading.content += self._body  # no call after all, or one that the bound on tokens cut off
        self._body = ""


def call_id() -> str:
    """A new id of a call, as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"
