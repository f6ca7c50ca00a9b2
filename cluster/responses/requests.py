"""Bodies of POST /v1/responses, as the chat bodies that they mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.openai.messages import TextPart
from lorafleet.cluster.openai.requests import ChatBody, StreamOptions
from lorafleet.cluster.openai.tools import MAX_TOOLS
from lorafleet.cluster.validation import Incoming, refusal_of

_PASSED_OVER = ConfigDict(frozen=True, extra="ignore", json_schema_extra={"additionalProperties": True})

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Fields that OpenAI gives an effect: the values without one are accepted, the others refused by name."""


def _parts(content: object) -> object:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


_Texts = Annotated[tuple[TextPart, ...], BeforeValidator(_parts, json_schema_input_type=str | tuple[TextPart, ...])]


class MessageItem(Incoming):
    """A message of the conversation."""

    model_config = _PASSED_OVER

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: _Texts = Field(description="A text, or text parts, which are joined by newlines.")


class FunctionCallItem(BaseModel):
    """A call that an earlier answer made."""

    model_config = _PASSED_OVER

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    arguments: str = Field(description="JSON.")


class FunctionOutputItem(Incoming):
    """The answer of a function."""

    model_config = _PASSED_OVER

    type: Literal["function_call_output"]
    call_id: str
    output: _Texts


class ReasoningText(BaseModel):
    """A part of a thought."""

    model_config = _PASSED_OVER

    text: str


class ReasoningItem(Incoming):
    """The reasoning of an earlier answer, for templates that show it."""

    model_config = _PASSED_OVER

    type: Literal["reasoning"]
    content: tuple[ReasoningText, ...] | None = None


def _typed(items: object) -> object:
    """An item with a role and without a type is a message."""
    if isinstance(items, str):
        return [{"type": "message", "role": "user", "content": items}]
    if not isinstance(items, list):
        return items
    return [
        {**item, "type": "message"} if isinstance(item, dict) and "role" in item and not item.get("type") else item
        for item in items
    ]


Item = Annotated[MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem, Field(discriminator="type")]


class FunctionTool(BaseModel):
    """A function that the model may call; no other tool is served."""

    model_config = _PASSED_OVER

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256, pattern=r"^[\w.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Hold the arguments to the schema by construction.")


class ChosenFunction(BaseModel):
    """The one function to call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["function"]
    name: str = Field(min_length=1)


class TextFormat(BaseModel):
    """The form that the answer must have."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="For `json_schema`.")
    strict: bool | None = Field(default=None, description="Accepted; every schema is kept to.")

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError(f"schema belongs to the type json_schema, this one is {self.type}")
        return self


class TextConfig(BaseModel):
    """The form of the text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(BaseModel):
    """Settings of the reasoning."""

    model_config = ConfigDict(frozen=True, extra="ignore", json_schema_extra={"additionalProperties": True})

    effort: str | None = Field(default=None, description="Given to the chat template as `reasoning_effort`.")
    summary: str | None = Field(default=None, description="Accepted; the reasoning itself is given.")


class ResponsesBody(Incoming):
    """Body of POST /v1/responses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="A base id, an adapter name, or base:adapter.")
    input: Annotated[
        tuple[Item, ...],
        BeforeValidator(_typed, json_schema_input_type=str | Annotated[tuple[Item, ...], Field(min_length=1)]),
    ] = Field(min_length=1, description="A text, or the items of the conversation so far.")
    instructions: str | None = Field(default=None, description="The system's message, before the input.")
    max_output_tokens: int | None = Field(default=None, ge=1, description="Most tokens to make.")
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, description="0 takes the likeliest token.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    tools: tuple[FunctionTool, ...] = Field(default=(), max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: Reasoning = Reasoning()
    stream: bool = Field(default=False, description="Answer by server-sent events.")
    stream_options: StreamOptions = StreamOptions()
    include: tuple[Literal["reasoning.encrypted_content"], ...] = Field(
        default=(), description="Accepted; nothing is encrypted."
    )
    previous_response_id: str | None = Field(default=None, description="Refused: no response is stored.")
    store: bool | None = Field(default=None, description="Accepted; the reply says false.")
    metadata: dict[str, Any] | None = Field(default=None, description="Comes back with the reply.")
    user: str | None = Field(default=None, description="Accepted, without an effect; so are the following fields.")
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def chat(self) -> ChatBody:
        """The chat body that means the same. Raises BadRequest."""
        if self.previous_response_id is not None:
            raise BadRequest(
                "no response is stored, so previous_response_id names none; send the conversation in input",
                "previous_response_id",
                "previous_response_not_found",
            )
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [*self._messages()],
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort,
            "tools": [{"type": "function", "function": _function(tool)} for tool in self.tools],
            "tool_choice": self.tool_choice,
        }
        if isinstance(self.tool_choice, ChosenFunction):
            fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if self.text.format is not None:
            form = self.text.format
            schema = None if form.schema_ is None else {"name": form.name, "schema": form.schema_}
            fields["response_format"] = {"type": form.type, "json_schema": schema}
        try:
            return ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})
        except ValidationError as error:
            raise refusal_of(error.errors(include_url=False), ChatBody.model_fields) from None

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Thoughts, texts and calls of the assistant that follow each other are one message."""
        if self.instructions:
            yield {"role": "system", "content": self.instructions}
        said: dict[str, Any] | None = None
        for item in self.input:
            is_assistants = isinstance(item, ReasoningItem | FunctionCallItem)
            if is_assistants or (isinstance(item, MessageItem) and item.role == "assistant"):
                if said is None:
                    said = {"role": "assistant", "content": [], "tool_calls": [], "reasoning_content": ""}
                _add(said, item)
                continue
            if said is not None:
                yield said
                said = None
            if isinstance(item, MessageItem):
                yield {"role": item.role, "content": _texts(item.content)}
            elif isinstance(item, FunctionOutputItem):
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _texts(item.output)}
        if said is not None:
            yield said


def _add(said: dict[str, Any], item: object) -> None:
    """To the assistant's message."""
    if isinstance(item, MessageItem):
        said["content"] += _texts(item.content)
    elif isinstance(item, FunctionCallItem):
        call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
        said["tool_calls"].append(call)
    elif isinstance(item, ReasoningItem):
        said["reasoning_content"] += "".join(part.text for part in item.content or ())


def _texts(parts: Sequence[TextPart]) -> list[dict[str, str]]:
    return [{"type": "text", "text": part.text} for part in parts]


def _function(tool: FunctionTool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.parameters or {}, "strict": tool.strict}
    return function if tool.description is None else function | {"description": tool.description}
