"""OpenAI's request bodies: what is accepted, what is refused because it would have an effect that is not there.

Turns the bytes of a body into `GenerateRequest`s. A field that is null counts as absent, as with OpenAI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import from_json

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.http.auth import CALLER
from lorafleet.cluster.openai.conversation import ConversationSettings
from lorafleet.cluster.openai.messages import ChatMessage, rendered
from lorafleet.cluster.openai.peer_defaults import INERT, PEER_DEFAULTS, is_among
from lorafleet.cluster.openai.tools import check_tools, outputs_of
from lorafleet.cluster.serving.answer_formats import TEXT_ONLY, AnswerFormat
from lorafleet.cluster.serving.fair_threads import FairThreads
from lorafleet.cluster.validation import Incoming, refusal_of, with_integers
from lorafleet.workers.request import (
    MAX_N,
    GenerateRequest,
    NumKept,
    SamplingParams,
    StructuredOutputs,
)

DEFAULT_MAX_TOKENS = 16
"""What completions make when the body does not say, as with OpenAI."""
MAX_STOPS = 16
MAX_ANSWERS = 256
"""Most answers to one body: prompts times `n`."""
MAX_PROMPTS = 2048
"""Most prompts of any body."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **PEER_DEFAULTS,
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True, False),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "separate_reasoning": (True,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that other servers give an effect: the values without one are accepted, the others refused by name.

A body that has such a field serves it in all its values.
"""


def neutral_of(kind: type[BaseModel]) -> Mapping[str, tuple[object, ...]]:
    """The part of `NEUTRAL` that holds for a kind of body."""
    return {name: values for name, values in NEUTRAL.items() if name not in kind.model_fields}


_Item = TypeVar("_Item")
_Text = Annotated[str, Field(min_length=1)]
_TokenId = Annotated[int, Field(ge=0)]
_NotEmpty = Annotated[list[_Item], Field(min_length=1)]
PromptShapes = _Text | _NotEmpty[_Text] | _NotEmpty[_TokenId] | _NotEmpty[_NotEmpty[_TokenId]]
"""Of a prompt, or of several, as JSON has them."""

_SHARED_FIELDS = frozenset({*SamplingParams.model_fields, "add_special_tokens", "truncate_prompt_tokens"}) - {
    "prompt_logprobs"
}


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _first(value: object) -> object:
    """SGLang takes a list of request ids, one for each prompt; a reply has one id."""
    return value[0] if isinstance(value, list) and value else value


def prompts_of(value: object, info: ValidationInfo) -> object:
    """All four shapes of a prompt as a tuple of texts or token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if not value:
            raise BadRequest(f"{info.field_name} must not be empty", info.field_name, "empty_prompt")
        if len(value) > MAX_PROMPTS and type(value[0]) is not int:
            raise ValueError(f"must be at most {MAX_PROMPTS} prompts")
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool = Field(default=False, description="A last chunk with the usage of the whole request.")
    continuous_usage_stats: bool = Field(
        default=False, description="With include_usage: each chunk has the usage of its own answer so far."
    )
    include_obfuscation: bool = Field(default=False, description="Accepted; nothing is padded.")

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> StreamOptions:
        """Itself, as it is frozen: pydantic copies a default for every request."""
        return self

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, options: Any) -> Any:
        if not isinstance(options, dict):
            return options
        return {name: value for name, value in options.items() if value is not None}


class JsonSchemaFormat(BaseModel):
    """A schema with a name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_by_name=True, validate_by_alias=True)

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(default={}, alias="schema", description="The answer is JSON that fits it.")
    strict: bool | None = Field(default=None, description="Accepted; every schema is kept to.")


class ResponseFormat(BaseModel):
    """The form that the answer must have."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(default=None, description="For `json_schema`.")

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"json_schema belongs to the type json_schema, this one is {self.type}")
        return self

    def outputs(self) -> StructuredOutputs:
        """The same in the engine's terms."""
        if self.json_schema is None:
            return StructuredOutputs(json_object=True)
        return StructuredOutputs(json_schema=self.json_schema.schema_)


class SharedBody(Incoming, SamplingParams):
    """Fields that both routes take: sampling parameters, the form of the answer, and fields without an effect."""

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
    best_of: int | None = Field(default=None, ge=1, description="Accepted as 1 or n: all answers are given.")
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_texts, json_schema_input_type=_Text | Annotated[list[_Text], Field(max_length=MAX_STOPS)]),
    ] = Field(
        default=(), max_length=MAX_STOPS, description="String or strings that end the text; they are not part of it."
    )
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_tuple)] = Field(
        default=(), description="Token ids that end the answer."
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="What the answer must be, as OpenAI has it: `json_object` or `json_schema`."
    )
    guided_json: dict[str, Any] | str | None = Field(
        default=None, description="vLLM's earlier names of what is in `structured_outputs`; so are the next three."
    )
    guided_regex: str | None = None
    guided_choice: Annotated[tuple[str, ...] | None, BeforeValidator(_tuple)] = None
    guided_grammar: str | None = None
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
    lora_path: Annotated[str | tuple[str | None, ...] | None, BeforeValidator(_tuple)] = Field(
        default=None,
        description="As SGLang has it: the adapter's name, or one for each prompt, where `model` names the base or the "
        "same.",
    )
    request_id: str | None = Field(
        default=None, description="Part of the reply's id; without it a header x-request-id is."
    )
    rid: Annotated[str | None, BeforeValidator(_first, json_schema_input_type=str | list[str] | None)] = Field(
        default=None, description="SGLang's name for request_id."
    )
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
            raise ValueError("stream_options=include_usage needs stream=true")
        if self.prompt_logprobs and self.stream:
            raise ValueError(
                f"prompt_logprobs={self.prompt_logprobs} cannot be streamed; leave out prompt_logprobs or stream"
            )
        if self.best_of not in (None, 1, self.n):
            raise ValueError(f"best_of={self.best_of} must be 1 or n={self.n}: all answers are given")
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
        asked = [*self._structured_outputs()]
        if len(asked) > 1:
            raise BadRequest(f"{asked[0][0]} and {asked[1][0]} both say what the answer must be; send one", asked[1][0])
        if asked:
            sampling["structured_outputs"] = asked[0][1]
        return sampling

    def adapters(self, num_prompts: int) -> Sequence[str | None]:
        """The `lora_path` of each prompt. Raises BadRequest where they are not as many."""
        paths = self.lora_path if isinstance(self.lora_path, tuple) else (self.lora_path,) * num_prompts
        if len(paths) != num_prompts:
            raise BadRequest(
                f"lora_path={len(paths)} names for {num_prompts} prompts: send one name, or one for each prompt",
                "lora_path",
            )
        return paths

    def _structured_outputs(self) -> Iterator[tuple[str, StructuredOutputs]]:
        """The form that the answer must have, with the field that asks for it."""
        if self.structured_outputs is not None:
            yield "structured_outputs", self.structured_outputs
        if self.response_format is not None and self.response_format.type != "text":
            yield "response_format", self.response_format.outputs()
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            if value not in (None, ()):
                yield f"guided_{kind}", StructuredOutputs.model_validate({kind: value})


class CompletionBody(SharedBody):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        tuple[str | tuple[int, ...], ...],
        BeforeValidator(
            prompts_of,
            json_schema_input_type=PromptShapes,
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
            raise ValueError("max_tokens=0 needs echo=true; without echo it must be at least 1")
        if len(self.prompt) * self.n > MAX_ANSWERS:
            raise ValueError(f"prompt={len(self.prompt)} prompts times n={self.n} is more than {MAX_ANSWERS} answers")
        return self

    @property
    def is_prompt_only(self) -> bool:
        """True if no token is to be made: the prompt is only scored."""
        return self.max_tokens == 0 and self.max_completion_tokens is None

    def requests(self) -> list[GenerateRequest]:
        """One request for each prompt. Raises BadRequest."""
        sampling = self.sampling()
        if self.is_prompt_only:
            sampling["max_tokens"] = 1  # made and not shown: a worker scores a prompt on the way to a token
        if self.echo and self.logprobs is not None:
            sampling["prompt_logprobs"] = True
            sampling["num_prompt_tops"] = max(self.logprobs, self.prompt_logprobs or 0)
        return [
            request_of(model=self.model, n=self.n, prompt=prompt, lora_path=path, **sampling)
            for prompt, path in zip(self.prompt, self.adapters(len(self.prompt)), strict=True)
        ]


class ChatBody(SharedBody, ConversationSettings):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    # A number for completions and a switch for chats is how OpenAI has it.
    logprobs: bool = Field(default=False, description="Report the logprob of each token.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Alternatives to report beside each token; needs logprobs."
    )
    include_reasoning: bool = Field(default=True, description="Whether what the model thought comes with the answer.")
    parallel_tool_calls: bool = Field(
        default=True, description="Whether an answer may have several calls; else it has the first one."
    )

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        return self

    def request(self, answers: AnswerFormat = TEXT_ONLY) -> GenerateRequest:
        """The request. answers: how the model writes calls and reasoning. Raises BadRequest."""
        check_tools(self.tools, self.choice, answers)
        sampling = self.sampling()
        thinks = answers.thinks and self.chat_template_kwargs.get("enable_thinking") is not False
        thinks = thinks and self.reasoning_effort != "none" and self.begins_answer
        outputs = outputs_of(
            self.tools,
            self.choice,
            answers,
            sampling.get("structured_outputs"),
            many=self.parallel_tool_calls,
            thinks=thinks,
            begins=self.begins_answer,
        )
        if outputs is not None:
            sampling["structured_outputs"] = outputs
        if answers.shows_special_tokens:
            sampling["skip_special_tokens"] = False
        sampling["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return request_of(
            model=self.model,
            n=self.n,
            messages=rendered(self.messages),
            template=self.template(),
            lora_path=self.adapters(1)[0],
            **sampling,
        )


Body = TypeVar("Body", bound=BaseModel)

LONG_BODY = 16384
"""Bytes above which a body is checked beside the event loop, so that other streams go on."""


def parse_body(kind: type[Body], raw: bytes, neutral: Mapping[str, Sequence[object]] = NEUTRAL) -> Body:
    """Check a body. neutral: fields without an effect, and the values in which they are accepted.

    Raises BadRequest with `invalid_json`, `unsupported_parameter`, `unknown_parameter`, `missing_parameter`,
    `empty_prompt` or `invalid_value`, naming the field.
    """
    try:
        body = from_json(raw, allow_inf_nan=False, cache_strings="keys")  # values of callers are not kept
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", None, "invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", None, "invalid_json")
    fields = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in neutral and name not in kind.model_fields:
            if not is_among(value, neutral[name]):
                raise BadRequest(f"{name} is not supported; leave it out", name, "unsupported_parameter")
            continue
        if name not in kind.model_fields and any(type(value) is type(inert) and value == inert for inert in INERT):
            continue
        fields[name] = with_integers(value)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise refusal_of(error.errors(include_url=False), kind.model_fields) from None


async def parsed(
    kind: type[Body],
    request: Request,
    threads: FairThreads,
    neutral: Mapping[str, Sequence[object]] = NEUTRAL,
) -> Body:
    """The checked body of a request; a long one is checked on a thread. Raises as `parse_body`, and BodyTooLarge."""
    raw = await request.body()
    if len(raw) <= LONG_BODY:
        return parse_body(kind, raw, neutral)
    return await threads.run(CALLER.get(), parse_body, kind, raw, neutral)


def request_of(**values: Any) -> GenerateRequest:
    """The request of these values. Raises BadRequest."""
    try:
        return GenerateRequest(**values)
    except ValidationError as error:
        raise refusal_of(error.errors(include_url=False), GenerateRequest.model_fields) from None
