"""OpenAI's request bodies: what is accepted, what is refused because it would have an effect that is not there.

Turns the bytes of a body into `GenerateRequest`s. A field that is null counts as absent, as with OpenAI.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.openai.peer_defaults import INERT, PEER_DEFAULTS, is_among
from lorafleet.cluster.validation import refusal_of, with_integers
from lorafleet.workers.request import MAX_N, GenerateRequest, NumKept, SamplingParams

DEFAULT_MAX_TOKENS = 16
"""What completions make when the body does not say, as with OpenAI."""
MAX_STOPS = 16
MAX_ANSWERS = 256
"""Most answers to one body: prompts times `n`."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **PEER_DEFAULTS,
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that other servers give an effect: the values without one are accepted, the others refused by name."""

_Item = TypeVar("_Item")
_Text = Annotated[str, Field(min_length=1)]
_TokenId = Annotated[int, Field(ge=0)]
_NotEmpty = Annotated[list[_Item], Field(min_length=1)]

_SHARED_FIELDS = frozenset(
    {*SamplingParams.model_fields, "add_special_tokens", "lora_path", "truncate_prompt_tokens"}
) - {"prompt_logprobs"}


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _prompts(value: object) -> object:
    """All four shapes of a prompt as a tuple of texts or token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if not value:
            raise BadRequest("prompt is empty", "prompt", "empty_prompt")
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")


class StreamOptions(BaseModel):
    """What a stream carries beside the answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool = Field(default=False, description="A last chunk with the usage of the whole request.")
    continuous_usage_stats: bool = Field(
        default=False, description="With include_usage: each chunk has the usage of its own answer so far."
    )
    include_obfuscation: bool = Field(default=False, description="Accepted; nothing is padded.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, options: Any) -> Any:
        if not isinstance(options, dict):
            return options
        return {name: value for name, value in options.items() if value is not None}


class SharedBody(SamplingParams):
    """What both routes accept: the sampling parameters, how to answer, and fields without an effect."""

    # Numbers and switches are as lax as vLLM's: "1", 1.0 and true for 1, and 0, "off" and their like for false.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra=lambda schema: schema["properties"].pop("num_prompt_tops", None),
    )

    model: str = Field(min_length=1, description="A base id, an adapter name, or base:adapter.")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens to make; goes before max_tokens."
    )
    n: int = Field(default=1, ge=1, le=MAX_N, description="Independent answers to each prompt.")
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_texts, json_schema_input_type=_Text | Annotated[list[_Text], Field(max_length=MAX_STOPS)]),
    ] = Field(
        default=(), max_length=MAX_STOPS, description="String or strings that end the text; they are not part of it."
    )
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_tuple)] = Field(
        default=(), description="Token ids that end the answer."
    )
    stream: bool = Field(default=False, description="Answer by server-sent events.")
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = Field(
        default=False, description="Answer with token ids too, of the prompt and the answers."
    )
    prompt_logprobs: int | None = Field(  # type: ignore[assignment]
        default=None,
        ge=0,
        le=20,
        description="Report the logprob of each prompt token, with so many alternatives; for whole replies only.",
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Put the tokenizer's own tokens (a begin token, say) around the text; default: for completions.",
    )
    truncate_prompt_tokens: NumKept | None = Field(
        default=None,
        description="Keep only so many tokens of the prompt, the last ones; -1: as many as leave room for the answer.",
    )
    lora_path: str | None = Field(
        default=None,
        description="As SGLang has it: the adapter's name, where `model` names the base or the same.",
    )
    request_id: str | None = Field(
        default=None, description="Part of the reply's id, unless a header x-request-id is there."
    )
    rid: str | None = Field(default=None, description="SGLang's name for request_id.")
    user: str | None = Field(default=None, description="Accepted, without an effect; so are the following fields.")
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    session_id: str | None = None
    custom_labels: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> SharedBody:
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options=include_usage is for streams only")
        if self.prompt_logprobs and self.stream:
            raise ValueError(f"prompt_logprobs={self.prompt_logprobs} is for whole replies; leave it or stream out")
        if self.max_completion_tokens is not None and self.min_tokens > self.max_completion_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_completion_tokens={self.max_completion_tokens}"
            )
        return self

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the body names."""
        sampling = {name: getattr(self, name) for name in self.model_fields_set & _SHARED_FIELDS}
        if self.max_completion_tokens is not None:
            sampling["max_tokens"] = self.max_completion_tokens
        if self.prompt_logprobs is not None and not self.stream:
            sampling |= {"prompt_logprobs": True, "num_prompt_tops": self.prompt_logprobs}
        return sampling


class CompletionBody(SharedBody):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        tuple[str | tuple[int, ...], ...],
        BeforeValidator(
            _prompts,
            json_schema_input_type=_Text | _NotEmpty[_Text] | _NotEmpty[_TokenId] | _NotEmpty[_NotEmpty[_TokenId]],
        ),
    ] = Field(description="A text, a list of texts, a list of token ids, or a list of lists of token ids.")
    max_tokens: int | None = Field(
        default=None,
        ge=0,
        description=f"Most tokens to make, {DEFAULT_MAX_TOKENS} if absent; 0, with echo, scores the prompt only.",
    )
    echo: bool = Field(default=False, description="Begin with the prompt; with logprobs, give those of the prompt too.")

    @model_validator(mode="after")
    def _nothing_to_make(self) -> CompletionBody:
        if self.is_prompt_only and not self.echo:
            raise ValueError("max_tokens=0 makes nothing; it is for echo only")
        if len(self.prompt) * self.n > MAX_ANSWERS:
            raise ValueError(f"prompt={len(self.prompt)} prompts times n={self.n} is over {MAX_ANSWERS} answers")
        return self

    @property
    def is_prompt_only(self) -> bool:
        """Whether nothing is to be made: the prompt is scored."""
        return self.max_tokens == 0 and self.max_completion_tokens is None

    def requests(self) -> list[GenerateRequest]:
        """One request for each prompt. Raises BadRequest."""
        sampling = self.sampling()
        if self.is_prompt_only:
            sampling["max_tokens"] = 1  # made and not shown: a worker scores a prompt on the way to a token
        if self.echo and self.logprobs is not None:
            sampling["prompt_logprobs"] = True
            sampling["num_prompt_tops"] = max(self.logprobs, self.prompt_logprobs or 0)
        return [_request(model=self.model, n=self.n, prompt=prompt, **sampling) for prompt in self.prompt]


class TextPart(BaseModel):
    """A part of a message; only text is served."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: str


def _parts(content: object) -> object:
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        json_schema_extra={"additionalProperties": {"enum": [None, []]}},
    )

    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | _NotEmpty[TextPart])]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, message: Any) -> Any:
        """Clients send answers back as they got them, with what was null or empty in them."""
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value is not None and value != []}

    def rendered(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        content = "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


class ChatBody(SharedBody):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    # A number for completions and a switch for chats is how OpenAI has it.
    logprobs: bool = Field(default=False, description="Report the logprob of each token.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Alternatives to report beside each token; needs logprobs."
    )

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs")
        return self

    def request(self) -> GenerateRequest:
        """The request. Raises BadRequest."""
        sampling = self.sampling()
        sampling["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        messages = tuple(message.rendered() for message in self.messages)
        return _request(model=self.model, n=self.n, messages=messages, **sampling)


Body = TypeVar("Body", bound=BaseModel)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """Check a body. Raises BadRequest with `invalid_json`, `unsupported_parameter`, `unknown_parameter`,
    `missing_parameter`, `empty_prompt` or `invalid_value`, naming the field.
    """
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is no valid JSON: {error}", None, "invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", None, "invalid_json")
    fields = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in NEUTRAL:
            if not is_among(value, NEUTRAL[name]):
                raise BadRequest(f"{name} is not supported; leave it out", name, "unsupported_parameter")
            continue
        if name not in kind.model_fields and any(type(value) is type(inert) and value == inert for inert in INERT):
            continue
        fields[name] = with_integers(value)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise refusal_of(error.errors(include_url=False), kind.model_fields) from None


def _request(**values: Any) -> GenerateRequest:
    try:
        return GenerateRequest(**values)
    except ValidationError as error:
        raise refusal_of(error.errors(include_url=False), GenerateRequest.model_fields) from None
