"""Replies of OpenAI's routes, for the OpenAPI document only. The replies themselves are written without these models.

A field with a default is left out of a reply where it says nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafleet.workers.config import Settings


class ServedBy(Settings):
    """The worker that answered, and the adapter's version."""

    worker_id: str
    version: str | None = Field(description="Of the adapter; null for the base.")


class ModelVersion(Settings):
    """The adapter behind a name."""

    version: str


class ModelCard(Settings):
    """The base, or an adapter that has a name."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix seconds.")
    owned_by: str
    root: str = Field(description="Where it came from: an adapter's source and key.")
    parent: str | None = Field(description="An adapter's base; null for the base.")
    max_model_len: int = Field(description="Longest prompt plus answer, in tokens.")
    lorafleet: ModelVersion | None = Field(default=None, description="Of adapters.")


class ModelList(Settings):
    """The base first, then the adapters by name."""

    object: Literal["list"]
    data: list[ModelCard]


class CachedTokens(Settings):
    """Of the prompt."""

    cached_tokens: int = Field(description="Those whose keys and values came from the prefix cache.")


class Usage(Settings):
    """Tokens of all prompts and answers; a prompt with `n` answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = Field(
        default=None, description="Absent from the usage so far, which `continuous_usage_stats` asks for."
    )


class CompletionLogprobs(Settings):
    """One entry a token; those of the prompt come first with `echo`.

    Logprobs are the model's own: before `logit_bias`, penalties, `temperature` and filters.
    """

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Settings):
    """A token at a place of the prompt, as vLLM has it."""

    logprob: float
    rank: int | None = Field(description="1 for the likeliest; null for one that is not among those asked for.")
    decoded_token: str


class CompletionChoice(Settings):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(description="The stop string or stop token id that ended it.")
    token_ids: list[int] | None = Field(default=None, description="With `return_token_ids`.")
    prompt_token_ids: list[int] | None = Field(default=None, description="With `return_token_ids`.")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        default=None, description="With `prompt_logprobs`: by token id; null for the first token."
    )
    lorafleet: ServedBy | None = Field(default=None, description="Where there are several answers.")


class Completion(Settings):
    """All answers."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    lorafleet: ServedBy = Field(description="Who gave the first answer.")


class CompletionPiece(Settings):
    """Text and tokens that a step added to one answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description="null until the answer's last piece.")
    stop_reason: str | int | None = Field(default=None, description="With the last piece.")
    token_ids: list[int] | None = Field(default=None, description="With `return_token_ids`.")
    prompt_token_ids: list[int] | None = Field(default=None, description="With the first piece.")


class CompletionChunk(Settings):
    """A piece of one answer, or, last and with `include_usage`, the usage and no choice."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionPiece] = Field(max_length=1)
    usage: Usage | None = None
    lorafleet: ServedBy | None = Field(default=None, description="With the first and last piece of each answer.")


class TopLogprob(Settings):
    """A token and its logprob: the model's own, before `logit_bias`, penalties, `temperature` and filters."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token that was made, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Settings):
    """One entry a token."""

    content: list[ChatLogprob]
    refusal: None


class AnsweredFunction(Settings):
    """A function and the arguments of a call."""

    name: str
    arguments: str = Field(description="JSON.")


class AnsweredCall(Settings):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(Settings):
    """The answer as a message."""

    role: Literal["assistant"]
    content: str | None = Field(description="null where there are calls only.")
    refusal: None
    reasoning_content: str | None = Field(default=None, description="What the model thought.")
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(Settings):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = Field(description="The stop string or stop token id that ended it.")
    token_ids: list[int] | None = Field(default=None, description="With `return_token_ids`.")
    lorafleet: ServedBy | None = Field(default=None, description="Where there are several answers.")


class ChatCompletion(Settings):
    """All answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = Field(default=None, description="With `return_token_ids`.")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        default=None, description="With `prompt_logprobs`: by token id; null for the first token."
    )
    lorafleet: ServedBy = Field(description="Who gave the first answer.")


class FunctionPiece(Settings):
    """A piece of a call: the name comes first, then the arguments."""

    name: str | None = None
    arguments: str


class CallPiece(Settings):
    """Part of one call that a step added."""

    index: int
    id: str | None = Field(default=None, description="With the first piece.")
    type: Literal["function"] | None = Field(default=None, description="With the first piece.")
    function: FunctionPiece


class AnswerDelta(Settings):
    """Part of the message that a step added."""

    role: Literal["assistant"] | None = Field(default=None, description="With the first piece.")
    content: str | None = None
    reasoning_content: str | None = Field(default=None, description="What the model thinks.")
    tool_calls: list[CallPiece] | None = None


class ChatPiece(Settings):
    """Text and tokens that a step added to one answer."""

    index: int
    delta: AnswerDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = Field(
        description="null until the answer's last piece."
    )
    stop_reason: str | int | None = Field(default=None, description="With the last piece.")
    token_ids: list[int] | None = Field(default=None, description="With `return_token_ids`.")


class ChatCompletionChunk(Settings):
    """A piece of one answer, or, last and with `include_usage`, the usage and no choice."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPiece] = Field(max_length=1)
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = Field(default=None, description="With the first piece.")
    lorafleet: ServedBy | None = Field(default=None, description="With the first and last piece of each answer.")
