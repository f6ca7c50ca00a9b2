"""Tools of a conversation and settings of its chat template, as several routes take them."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from lorafleet.cluster.openai.messages import RESERVED_OPTIONS, check_template_options
from lorafleet.cluster.openai.tools import ToolChoice, Tools
from lorafleet.cluster.validation import Incoming
from lorafleet.workers.request import TemplateOptions


class ConversationSettings(Incoming):
    """Tools and settings that a chat template is given beside the messages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    add_generation_prompt: bool = Field(
        default=True, description="End the prompt with what begins an answer in the chat template."
    )
    continue_final_message: bool = Field(
        default=False,
        description="The answer goes on with the last message, which is left open: no add_generation_prompt then.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={},
        description="Variables of the chat template, say `enable_thinking`.",
        json_schema_extra={"propertyNames": {"not": {"enum": [*sorted(RESERVED_OPTIONS)]}}},
    )
    reasoning_effort: str | None = Field(
        default=None,
        description="Given to the chat template under this name; `none` also sets its `enable_thinking` to false.",
    )
    tools: Tools = Field(default=(), description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="`auto` if there are tools, else `none`; `required` and a named function must be called.",
    )

    @model_validator(mode="after")
    def _ends_one_way(self) -> ConversationSettings:
        is_asked = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and is_asked:
            raise ValueError("continue_final_message=true needs add_generation_prompt=false")
        return self

    @property
    def begins_answer(self) -> bool:
        """True if the prompt ends with what begins an answer."""
        return self.add_generation_prompt and not self.continue_final_message

    @property
    def choice(self) -> ToolChoice:
        """Return the choice among the tools."""
        return self.tool_choice or ("auto" if self.tools else "none")

    def template(self) -> TemplateOptions:
        """The settings of the chat template. Raises BadRequest."""
        check_template_options(self.chat_template_kwargs)
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                variables["enable_thinking"] = False
        return TemplateOptions(
            add_generation_prompt=self.begins_answer,
            continue_final_message=self.continue_final_message,
            tools=() if self.choice == "none" else tuple(tool.rendered() for tool in self.tools),
            variables=variables | self.chat_template_kwargs,
        )
