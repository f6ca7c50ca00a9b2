"""Anthropic's replies: messages, whole and as events, and errors."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from lorafleet.cluster.anthropic.requests import MessagesBody
from lorafleet.cluster.errors import ErrorReply
from lorafleet.cluster.openai.reading import Piece
from lorafleet.cluster.openai.turns import Turn
from lorafleet.cluster.openai.writing import to_json
from lorafleet.workers.request import GenerateDelta

_KINDS = {"content": "text", "reasoning": "thinking", "call": "tool_use", "arguments": "tool_use"}
"""Of the block that a piece belongs to."""
_DELTAS = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "arguments": ("input_json_delta", "partial_json"),
}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class MessageReply:
    """Reply of POST /v1/messages."""

    def __init__(self, body: MessagesBody, turn: Turn) -> None:
        self._turn = turn
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._model = body.model
        self._num_blocks = 0
        self._open: str | None = None
        """Kind of the block that is not closed."""

    def feed(self, delta: GenerateDelta) -> None:
        """Keep a delta for the whole reply."""
        self._turn.keep(delta)

    def whole(self) -> bytes:
        """The message."""
        blocks: list[dict[str, Any]] = []
        texts: list[str] = []
        for piece in self._turn.read_all():
            kind = _KINDS[piece.kind]
            if piece.kind == "call" or not blocks or blocks[-1]["type"] != kind:
                blocks.append(self._block(piece))
                texts.append("")
            if piece.kind != "call":
                texts[-1] += piece.text
        for block, text in zip(blocks, texts, strict=True):
            if block["type"] == "tool_use":
                block["input"] = _object(text)
            else:
                block[block["type"]] = text
        return to_json(self._message(blocks) | self._ending() | {"usage": self._usage()}).encode()

    def chunk(self, delta: GenerateDelta) -> bytes | None:
        """The events for a delta."""
        is_first = self._turn.last is None
        pieces = self._turn.read(delta)
        events = b""
        if is_first:
            usage = self._usage() | {"output_tokens": 0}
            message = self._message([]) | {"stop_reason": None, "stop_sequence": None, "usage": usage}
            events = _event("message_start", message=message)
        for piece in pieces:
            if piece.kind == "call" or self._open != _KINDS[piece.kind]:
                events += self._close()
                self._open = _KINDS[piece.kind]
                events += _event("content_block_start", index=self._num_blocks, content_block=self._block(piece))
            if piece.kind != "call":
                kind, name = _DELTAS[piece.kind]
                events += _event("content_block_delta", index=self._num_blocks, delta={"type": kind, name: piece.text})
        return events or None

    def end(self) -> bytes:
        """The events that end a stream."""
        ended = _event("message_delta", delta=self._ending(), usage=self._usage())
        return self._close() + ended + _event("message_stop")

    def failure(self, error: ErrorReply) -> bytes:
        """The event that ends a stream whose status is long sent."""
        return _event("error", error=error_of(error))

    def headers(self) -> Mapping[str, str]:
        """Headers that name the answering worker and the adapter's version."""
        return self._turn.headers()

    def _message(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": blocks}

    def _block(self, piece: Piece) -> dict[str, Any]:
        """An empty block for a piece."""
        if piece.kind == "content":
            return {"type": "text", "text": ""}
        if piece.kind == "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": piece.text, "input": {}}

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        self._num_blocks += 1
        return _event("content_block_stop", index=self._num_blocks - 1)

    def _ending(self) -> dict[str, Any]:
        turn = self._turn
        if turn.is_cut_off:
            reason = "max_tokens"
        elif turn.stop_string is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if turn.num_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": turn.stop_string}

    def _usage(self) -> dict[str, int]:
        """Anthropic counts cached tokens apart from the input's others."""
        turn = self._turn
        return {
            "input_tokens": turn.num_prompt_tokens - turn.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": turn.num_cached_tokens,
            "output_tokens": turn.num_tokens,
        }


def error_of(error: ErrorReply) -> dict[str, Any]:
    """An error under Anthropic's names of types, with the service's own code."""
    kind = _ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": kind, "message": error.message, "param": error.param, "code": error.code}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {to_json({'type': kind, **fields})}\n\n".encode()


def _object(arguments: str) -> dict[str, Any]:
    """Arguments as the object that Anthropic's clients read; empty where the answer was cut off in them."""
    try:
        found = from_json(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
