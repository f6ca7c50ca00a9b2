"""Replies of POST /v1/responses, for the OpenAPI document only. The replies themselves are written without these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from lorafleet.workers.config import Settings


class OutputPart(Settings):
    """A part of an item."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class OutputItem(Settings):
    """A thought, a message or a call: the fields of its type."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputPart] | None = None
    summary: list[Any] | None = Field(default=None, description="Empty: the reasoning itself is in `content`.")
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = Field(default=None, description="JSON.")


class InputDetails(Settings):
    """Of the input."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Settings):
    """Of the output."""

    reasoning_tokens: int = Field(description="Those that brought reasoning only; counted in streams.")


class ResponseUsage(Settings):
    """Tokens of input and output."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(Settings):
    """The reason why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(Settings):
    """The answer, and the settings that it was made with."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: Incomplete | None
    output: list[OutputItem]
    usage: ResponseUsage
    previous_response_id: None
    store: Literal[False] = Field(description="Nothing is stored.")


class ResponseEvent(Settings):
    """An event of a stream, with the fields of its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
