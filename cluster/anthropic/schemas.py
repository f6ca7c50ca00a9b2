"""Replies of Anthropic's routes, for the OpenAPI document only. The replies themselves are written without these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from lorafleet.workers.config import Settings


class AnsweredBlock(Settings):
    """A part of an answer: the fields of its type."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = Field(default=None, description="Empty.")
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(Settings):
    """Tokens of prompt and answer."""

    input_tokens: int = Field(description="Without those that were cached.")
    cache_creation_input_tokens: int = Field(description="0: the prefix cache costs nothing apart.")
    cache_read_input_tokens: int
    output_tokens: int


class AnsweredMessage(Settings):
    """The answer as a message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnsweredBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(Settings):
    """An event of a stream, with the fields of its type."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class TokenCount(Settings):
    """Length of a prompt."""

    input_tokens: int


class AnthropicErrorDetail(Settings):
    """An error."""

    type: str
    message: str = Field(description="For people; carries no paths of the server.")
    param: str | None = Field(description="The field at fault, where there is one.")
    code: str = Field(description="For programs, and stable.")


class AnthropicError(Settings):
    """Any error of these routes."""

    type: Literal["error"]
    error: AnthropicErrorDetail
