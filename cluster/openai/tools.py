"""Tools in a request: which functions a model may call, must call, and how its calls are held to their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.serving.answer_formats import AnswerFormat, calls_grammar, talk_grammar
from lorafleet.workers.request import StructuredOutputs

MAX_TOOLS = 256
ANY_TEXT = r"(.|\n)*"


def _or_empty(given: object) -> object:
    return {} if given is None else given


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(frozen=True, extra="ignore", json_schema_extra={"additionalProperties": True})

    name: str = Field(min_length=1, max_length=256, pattern=r"^[\w.-]+$")
    description: str | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(_or_empty, json_schema_input_type=dict[str, Any] | None)] = (
        Field(default={}, description="JSON schema of its arguments.")
    )
    strict: bool | None = Field(default=None, description="Hold the arguments to the schema by construction.")


class Tool(BaseModel):
    """A tool; only functions are served."""

    model_config = ConfigDict(frozen=True, extra="ignore", json_schema_extra={"additionalProperties": True})

    type: Literal["function"] = "function"
    function: Function

    def rendered(self) -> dict[str, Any]:
        """The tool as chat templates know it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class ChosenName(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)


class ChosenTool(BaseModel):
    """The one function to call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["function"] = "function"
    function: ChosenName


ToolChoice = Literal["none", "auto", "required"] | ChosenTool
Tools = Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS)]


def check_tools(tools: Sequence[Tool], choice: ToolChoice, answers: AnswerFormat) -> None:
    """Raise BadRequest where the tools cannot be served."""
    if tools and choice != "none" and not answers.has_tools:
        raise BadRequest(
            "tools are not served: the model's tokenizer has no response template and model.tool_parser is not set",
            "tools",
            "unsupported_parameter",
        )
    if choice in ("required",) and not tools:
        raise BadRequest(f"tool_choice={choice} needs tools; send tools or leave tool_choice out", "tool_choice")
    if isinstance(choice, ChosenTool) and choice.function.name not in {tool.function.name for tool in tools}:
        raise BadRequest(f"tool_choice names {choice.function.name!r}, which is not in tools", "tool_choice")


def outputs_of(
    tools: Sequence[Tool],
    choice: ToolChoice,
    answers: AnswerFormat,
    asked: StructuredOutputs | None,
    *,
    many: bool,
    thinks: bool,
    begins: bool,
) -> StructuredOutputs | None:
    """Return the grammar that holds an answer to the tools and to `asked`, the form that it must have without a call.

    many: several calls may come. thinks: a thought may come first. begins: the prompt ends with what begins an answer.
    None: there is no grammar. Raises BadRequest.
    """
    must = choice == "required" or isinstance(choice, ChosenTool)
    functions = [] if choice == "none" else [tool.function for tool in tools]
    if must or any(function.strict for function in functions):
        if answers.tools is None:
            raise BadRequest(
                "tool_choice=required, a named function and strict need model.tool_parser; the tokenizer's response "
                "template says how to read calls, not how to write them",
                "tool_choice",
                "unsupported_parameter",
            )
        if asked is not None and not must and answers.tools.begins_as_json:
            raise BadRequest(
                "response_format and strict exclude each other here: the model writes calls as JSON, as the answer is",
                "tools",
            )
    elif asked is None or not functions or answers.tools is None or answers.tools.begins_as_json:
        return _framed(asked, answers, thinks=thinks, begins=begins)
    if isinstance(choice, ChosenTool):
        functions = [function for function in functions if function.name == choice.function.name]
        many = False
    schemas = [
        (function.name, function.parameters if must or function.strict else {"type": "object"})
        for function in functions
    ]
    if not must and asked is None and not answers.has_channels:
        return StructuredOutputs(grammar=talk_grammar(answers.tools, schemas))
    calls = calls_grammar(answers.tools, schemas, many=many)
    if must:
        thought = "analysis" if answers.has_channels and begins else "may_come" if thinks else None
        return StructuredOutputs(grammar=calls, thought=thought)
    asked = asked or StructuredOutputs(regex=ANY_TEXT)
    return _framed(asked.model_copy(update={"calls": calls}), answers, thinks=thinks, begins=begins)


def _framed(
    asked: StructuredOutputs | None, answers: AnswerFormat, *, thinks: bool, begins: bool
) -> StructuredOutputs | None:
    """The same, with what may or must come before an answer in text."""
    if asked is None or asked.thought is not None:
        return asked
    thought = "analysis_final" if answers.has_channels and begins else "may_come" if thinks else None
    return asked.model_copy(update={"thought": thought})
