"""Bodies of vLLM's routes beside OpenAI's: tokenising, and what the service is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lorafleet.cluster.openai.conversation import ConversationSettings
from lorafleet.cluster.openai.messages import ChatMessage
from lorafleet.cluster.validation import Incoming
from lorafleet.workers.config import Settings

_Ids = Annotated[tuple[int, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class TokenizeBody(ConversationSettings):
    """Body of POST /tokenize: a text, or a conversation as the chat template writes it."""

    model: str | None = Field(default=None, min_length=1, description="A base id, an adapter name, or base:adapter.")
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, description="As in a chat.")
    add_special_tokens: bool | None = Field(default=None, description="Default: for a prompt only.")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt=... or messages=... must be given, and not both")
        return self


class TokenizeReply(Settings):
    """vLLM's."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenizerInfo(BaseModel):
    """vLLM's: the tokenizer's class, special tokens and settings, as its own configuration names them."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str | None
    model_max_length: int = Field(description="As the service has it.")
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None


class DetokenizeBody(Incoming):
    """Body of POST /detokenize."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(default=None, min_length=1, description="A base id, an adapter name, or base:adapter.")
    tokens: _Ids = Field(description="Token ids.")


class DetokenizeReply(Settings):
    """vLLM's."""

    prompt: str


class VersionReply(Settings):
    """vLLM's; the version is ours."""

    version: str
