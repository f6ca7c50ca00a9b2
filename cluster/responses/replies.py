"""OpenAI's responses, whole and as events. A response is a list of items: thoughts, messages and calls."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from lorafleet.cluster.errors import ErrorReply
from lorafleet.cluster.openai.reading import Piece, call_id
from lorafleet.cluster.openai.turns import Turn
from lorafleet.cluster.openai.writing import to_json
from lorafleet.cluster.responses.requests import ResponsesBody
from lorafleet.workers.request import GenerateDelta

_KINDS = {"content": "message", "reasoning": "reasoning", "call": "function_call", "arguments": "function_call"}
"""Of the item that a piece belongs to."""
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class ResponseReply:
    """Reply of POST /v1/responses."""

    def __init__(self, body: ResponsesBody, turn: Turn) -> None:
        self._turn = turn
        self._items: list[dict[str, Any]] = []
        """Those that have begun; the last one may be open."""
        self._text = ""
        """Of the last one."""
        self._is_open = False
        self._num_events = 0
        given = body.model_dump(by_alias=True, exclude_none=True)
        self._frame: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": given["text"].get("format", {"type": "text"})},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given["tools"],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def feed(self, delta: GenerateDelta) -> None:
        """Keep a delta for the whole reply."""
        self._turn.keep(delta)

    def whole(self) -> bytes:
        """The response."""
        for piece in self._turn.read_all():
            self._take(piece)
        self._close(is_last=True)
        return to_json(self._response()).encode()

    def chunk(self, delta: GenerateDelta) -> bytes | None:
        """The events for a delta."""
        is_first = self._turn.last is None
        pieces = self._turn.read(delta)
        events = b""
        if is_first:
            begun = self._frame | {"status": "in_progress", "output": [], "usage": None}
            events += self._event("response.created", response=begun)
            events += self._event("response.in_progress", response=begun)
        for piece in pieces:
            events += self._take(piece)
        return events or None

    def end(self) -> bytes:
        """The events that end a stream."""
        closed = self._close(is_last=True)
        response = self._response()
        return closed + self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ErrorReply) -> bytes:
        """The event that ends a stream whose status is long sent."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def headers(self) -> Mapping[str, str]:
        """Headers that name the answering worker and the adapter's version."""
        return self._turn.headers()

    def _take(self, piece: Piece) -> bytes:
        """The events for a piece."""
        kind, events = _KINDS[piece.kind], b""
        if piece.kind == "call" or not self._is_open or self._items[-1]["type"] != kind:
            events = self._close() + self._begin(kind, piece.text)
        if piece.kind == "call":
            return events
        self._text += piece.text
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return events + self._event(f"{_EVENTS[kind]}.delta", delta=piece.text, **self._place(), **logprobs)

    def _begin(self, kind: str, name: str) -> bytes:
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": call_id(), "name": name, "arguments": ""}
        elif kind == "message":
            item |= {"role": "assistant", "content": []}
        else:
            item |= {"summary": [], "content": []}
        self._items.append(item)
        self._text, self._is_open = "", True
        events = self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)
        if kind != "function_call":
            events += self._event("response.content_part.added", part=self._part(""), **self._place())
        return events

    def _close(self, *, is_last: bool = False) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        item, text = self._items[-1], self._text
        kind = item["type"]
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        name = {"arguments": text, "name": item["name"]} if kind == "function_call" else {"text": text}
        events = self._event(f"{_EVENTS[kind]}.done", **name, **self._place(), **logprobs)
        if kind == "function_call":
            item["arguments"] = text
        else:
            item["content"] = [self._part(text)]
            events += self._event("response.content_part.done", part=self._part(text), **self._place())
        item["status"] = "incomplete" if is_last and self._turn.is_cut_off else "completed"
        return events + self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _part(self, text: str) -> dict[str, Any]:
        if self._items[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _place(self) -> dict[str, Any]:
        """Of the last item, as events tell it."""
        item = self._items[-1]
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        return place if item["type"] == "function_call" else place | {"content_index": 0}

    def _response(self) -> dict[str, Any]:
        turn = self._turn
        ending: dict[str, Any] = {"status": "completed"}
        if turn.is_cut_off:
            ending = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        usage = {
            "input_tokens": turn.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": turn.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": turn.num_tokens,
            "output_tokens_details": {"reasoning_tokens": turn.num_reasoning_tokens},
            "total_tokens": turn.num_prompt_tokens + turn.num_tokens,
        }
        return self._frame | ending | {"output": self._items, "usage": usage}

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {to_json(data)}\n\n".encode()
