"""Messages of a conversation as clients send them, and as chat templates read them.

What a client keeps in a message for itself (`id`, `cache_control`, `refusal`, `annotations`, ...) is passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import from_json

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.validation import Incoming

_PASSED_OVER = ConfigDict(frozen=True, extra="ignore", strict=True, json_schema_extra={"additionalProperties": True})


def _describe_nulls(schema: dict[str, Any]) -> None:
    """Null counts as absent, and only an assistant's message may lack its content."""
    schema["additionalProperties"] = True
    schema["properties"]["tool_calls"] = {"anyOf": [schema["properties"]["tool_calls"], {"type": "null"}]}
    schema["anyOf"] = [
        {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
        {"properties": {"role": {"const": "assistant"}}},
    ]


class TextPart(BaseModel):
    """A part of a message; only text is served."""

    model_config = _PASSED_OVER

    type: Literal["text", "input_text", "output_text", "refusal"] = "text"
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refusal_as_text(cls, part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") == "refusal" and "text" not in part:
            return {**part, "text": part.get("refusal")}
        return part


def _parts(content: object) -> object:
    if content is None:
        return []
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


def _arguments(value: object) -> object:
    """Templates write arguments themselves, so a text of a JSON object becomes the object.

    Other text stays as the model wrote it: a conversation goes on after a broken call.
    """
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        read = from_json(value) if value.strip() else {}
    except ValueError:
        return value
    return read if isinstance(read, dict) else value


class CalledFunction(BaseModel):
    """A function with the arguments of one call."""

    model_config = _PASSED_OVER

    name: str = Field(min_length=1)
    arguments: Annotated[
        dict[str, Any] | str, BeforeValidator(_arguments, json_schema_input_type=dict[str, Any] | str | None)
    ] = {}


class PastToolCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = _PASSED_OVER

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Incoming):
    """One message of a conversation."""

    model_config = _PASSED_OVER | ConfigDict(json_schema_extra=_describe_nulls)

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart] | None)] = (
        Field(default=[], description="A text, or text parts, which are joined by newlines as vLLM joins them.")
    )
    name: str | None = None
    tool_calls: list[PastToolCall] = Field(default=[], description="Of an assistant: the functions that it called.")
    tool_call_id: str | None = Field(default=None, description="Of a tool: the call that it answers.")
    reasoning_content: str | None = Field(default=None, description="Of an assistant, for templates that show it.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: Any) -> Any:
        """Clients send answers back as they got them, with what was null in them."""
        if not isinstance(message, dict):
            return message
        found = {name: value for name, value in message.items() if value is not None}
        if isinstance(found.get("reasoning"), str):
            found.setdefault("reasoning_content", found["reasoning"])
        return found

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise ValueError(f"content is missing; only an assistant's message may go without, this one is {self.role}")
        return self

    def rendered(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        message: dict[str, Any] = {
            # Templates know no developer: it is OpenAI's later name of the system.
            "role": "system" if self.role == "developer" else self.role,
            "content": "\n".join(part.text for part in self.content),
        }
        if self.tool_calls and self.role == "assistant":
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        if self.reasoning_content and self.role == "assistant":
            message["reasoning_content"] = self.reasoning_content
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        return message


def rendered(messages: list[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """A conversation for a chat template. A tool's answer gets the name of the function that it answers for."""
    names: dict[str | None, str] = {}
    conversation = []
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls}
        entry = message.rendered()
        if message.role == "tool" and message.tool_call_id in names:
            entry.setdefault("name", names[message.tool_call_id])
        conversation.append(entry)
    return tuple(conversation)


RESERVED_OPTIONS = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "documents", "messages", "tools", "tokenize"}
    | {"conversation", "max_length", "padding", "processor_kwargs", "return_dict", "return_tensors", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "truncation"}
)
"""Arguments of `apply_chat_template` that a request may not set through `chat_template_kwargs`."""


def check_template_options(options: dict[str, Any]) -> None:
    """Raise BadRequest where `chat_template_kwargs` would set what is not the template's own."""
    for name in sorted(options.keys() & RESERVED_OPTIONS):
        place = f"chat_template_kwargs.{name}"
        raise BadRequest(f"{place} may not be set; chat_template_kwargs are the template's own variables", place)
