"""Anthropic's request bodies, as the chat bodies that they mean.

What a client keeps in a block for itself (`cache_control`, `citations`, `signature`, ...) is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.openai.requests import MAX_STOPS, ChatBody
from lorafleet.cluster.openai.tools import MAX_TOOLS
from lorafleet.cluster.validation import Incoming, refusal_of

_PASSED_OVER = ConfigDict(frozen=True, extra="ignore", json_schema_extra={"additionalProperties": True})

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "container": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
}
"""Fields that Anthropic gives an effect: the values without one are accepted, the others refused by name."""


class TextBlock(BaseModel):
    """Text."""

    model_config = _PASSED_OVER

    type: Literal["text"]
    text: str


class ToolUseBlock(BaseModel):
    """A call that an earlier answer made."""

    model_config = _PASSED_OVER

    type: Literal["tool_use"]
    id: str
    name: str = Field(min_length=1)
    input: dict[str, Any] = {}


def _blocks(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_Texts = Annotated[tuple[TextBlock, ...], BeforeValidator(_blocks, json_schema_input_type=str | tuple[TextBlock, ...])]


class ToolResultBlock(Incoming):
    """The answer of a tool."""

    model_config = _PASSED_OVER

    type: Literal["tool_result"]
    tool_use_id: str
    content: _Texts = ()
    is_error: bool = Field(default=False, description="Accepted; the content is what the model is told.")


class ThinkingBlock(BaseModel):
    """The reasoning of an earlier answer, for templates that show it."""

    model_config = _PASSED_OVER

    type: Literal["thinking"]
    thinking: str = ""


class RedactedThinkingBlock(BaseModel):
    """Passed over."""

    model_config = _PASSED_OVER

    type: Literal["redacted_thinking"]


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]


class Message(Incoming):
    """One turn of a conversation."""

    model_config = _PASSED_OVER

    role: Literal["user", "assistant", "system"]
    content: Annotated[tuple[Block, ...], BeforeValidator(_blocks, json_schema_input_type=str | tuple[Block, ...])] = (
        Field(description="A text, or blocks; text blocks that follow each other are joined by newlines.")
    )

    def rendered(self) -> Iterator[dict[str, Any]]:
        """The chat messages that it is: a tool's answers are messages of their own."""
        if self.role == "user":
            yield from self._of_user()
            return
        if self.role == "system":
            yield {"role": "system", "content": _parts(self.content)}
            return
        message: dict[str, Any] = {"role": "assistant", "content": _parts(self.content)}
        message["reasoning_content"] = "\n".join(b.thinking for b in self.content if isinstance(b, ThinkingBlock))
        message["tool_calls"] = [
            {"id": block.id, "function": {"name": block.name, "arguments": block.input}}
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        yield message

    def _of_user(self) -> Iterator[dict[str, Any]]:
        said: list[dict[str, str]] = []
        for block in self.content:
            if isinstance(block, TextBlock):
                said += _parts([block])
            elif isinstance(block, ToolResultBlock):
                if said:
                    yield {"role": "user", "content": said}
                said = []
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _parts(block.content)}
        if said or not any(isinstance(block, ToolResultBlock) for block in self.content):
            yield {"role": "user", "content": said}

    @property
    def calls(self) -> bool:
        """True if the message makes calls."""
        return any(isinstance(block, ToolUseBlock) for block in self.content)


class Tool(BaseModel):
    """A tool of the client's own; no other is served."""

    model_config = _PASSED_OVER

    type: Literal["custom"] | None = "custom"
    name: str = Field(min_length=1, max_length=256, pattern=r"^[\w.-]+$")
    description: str | None = None
    input_schema: dict[str, Any] = Field(default={}, description="JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Hold the arguments to the schema by construction.")


class ToolChoice(BaseModel):
    """The tools that must be called."""

    model_config = _PASSED_OVER

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = Field(default=None, min_length=1, description="For `tool`.")
    disable_parallel_tool_use: bool = False


class Thinking(BaseModel):
    """Switches reasoning: `enabled` and `adaptive` set the chat template's `enable_thinking`."""

    model_config = _PASSED_OVER

    type: Literal["enabled", "adaptive", "disabled"]


class OutputFormat(BaseModel):
    """The answer is JSON that fits the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """The form of the answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    effort: str | None = Field(default=None, description="Given to the chat template as `reasoning_effort`.")
    format: OutputFormat | None = None


class CountBody(Incoming):
    """Body of POST /v1/messages/count_tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="A base id, an adapter name, or base:adapter.")
    messages: tuple[Message, ...] = Field(
        min_length=1, description="The conversation so far; an answer goes on with a last message of the assistant."
    )
    system: _Texts = Field(default=(), description="A text, or text blocks.")
    tools: tuple[Tool, ...] = Field(default=(), max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(default=None, description="Default: as the chat template has it.")
    output_config: OutputConfig = OutputConfig()
    cache_control: dict[str, Any] | None = Field(default=None, description="Accepted; all prompts are cached.")
    context_management: dict[str, Any] | None = Field(default=None, description="Accepted; nothing is edited.")

    def chat(self, **more: Any) -> ChatBody:
        """The chat body that means the same. Raises BadRequest."""
        fields: dict[str, Any] = {"model": self.model, "messages": [*self._messages()], **more}
        if self.tools:
            fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in self.tools]
        if self.tool_choice is not None:
            fields |= self._choice(self.tool_choice)
        if self.messages[-1].role == "assistant":
            if self.messages[-1].calls:
                raise BadRequest("messages end with tool_use; send its tool_result", "messages")
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        if self.output_config.effort is not None:
            fields["reasoning_effort"] = self.output_config.effort
        if self.output_config.format is not None:
            schema = {"schema": self.output_config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            return ChatBody.model_validate(fields)
        except ValidationError as error:
            raise refusal_of(error.errors(include_url=False), ChatBody.model_fields) from None

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Turns of one role that follow each other are one, as with Anthropic."""
        if self.system:
            yield {"role": "system", "content": _parts(self.system)}
        last: dict[str, Any] | None = None
        for message in (each for turn in self.messages for each in turn.rendered()):
            if last is not None and last["role"] == message["role"] in ("user", "assistant"):
                last = _joined(last, message)
                continue
            if last is not None:
                yield last
            last = message
        if last is not None:
            yield last

    @staticmethod
    def _choice(choice: ToolChoice) -> dict[str, Any]:
        fields: dict[str, Any] = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
        if choice.type == "tool":
            if choice.name is None:
                raise BadRequest("tool_choice.name is missing", "tool_choice.name", "missing_parameter")
            return fields | {"tool_choice": {"type": "function", "function": {"name": choice.name}}}
        return fields | {"tool_choice": "required" if choice.type == "any" else choice.type}


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two turns of one role as one."""
    joined = first | {"content": first["content"] + second["content"]}
    if first["role"] == "assistant":
        thoughts = filter(None, (first["reasoning_content"], second["reasoning_content"]))
        joined |= {"reasoning_content": "\n".join(thoughts), "tool_calls": first["tool_calls"] + second["tool_calls"]}
    return joined


class MessagesBody(CountBody):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(ge=1, description="Most tokens to make. The model's length bounds the answer too.")
    stop_sequences: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), max_length=MAX_STOPS, description="Strings that end the text; they are not part of it."
    )
    stream: bool = Field(default=False, description="Answer by server-sent events.")
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, description="0 takes the likeliest token.")
    top_k: int = Field(default=0, ge=-1, description="Only so many of the likeliest tokens; 0 or -1: all.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    metadata: dict[str, Any] | None = Field(default=None, description="Accepted, without an effect; so is the next.")
    service_tier: str | None = None

    def chat(self, **more: Any) -> ChatBody:
        """The chat body that means the same. Raises BadRequest."""
        return super().chat(
            stop=list(self.stop_sequences),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            **more,
        )


def _parts(blocks: Any) -> list[dict[str, str]]:
    return [{"type": "text", "text": block.text} for block in blocks if isinstance(block, TextBlock)]


def _function(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema, "strict": tool.strict}
    return function if tool.description is None else function | {"description": tool.description}
