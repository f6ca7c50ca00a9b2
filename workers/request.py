"""The typed request that HTTP, the Python handle and the engine share, and what streams back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Struct
from msgspec.structs import replace
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticKnownError

FinishReason = Literal["stop", "length", "abort"]

MAX_N = 128
"""Most answers to one prompt, as with OpenAI."""

MAX_BIASES = 1024

_DECIMAL = re.compile("0|[1-9][0-9]{0,18}")


def _token_id(key: object) -> object:
    """JSON has only texts for keys."""
    return int(key) if isinstance(key, str) and _DECIMAL.fullmatch(key) else key


def _few_biases(value: object) -> object:
    """Count entries before they are checked: pydantic checks all, and holds up every thread meanwhile."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        context = {"field_type": "Dictionary", "max_length": MAX_BIASES, "actual_length": len(value)}
        raise PydanticKnownError("too_long", context)
    return value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be -1, or at least 1")
    return value


NumKept = Annotated[int, Field(ge=-1), AfterValidator(_not_zero), Field(json_schema_extra={"not": {"const": 0}})]
"""How many tokens of a prompt to keep; -1: as many as leave room for the answer."""

TokenIdKey = Annotated[int, BeforeValidator(_token_id), Field(ge=0)]


GrammarKind = Literal["json", "regex", "choice", "grammar", "lark"]


Pooling = Literal["last", "mean"]
"""Which hidden states of a prompt become its embedding: the last token's, or the mean of all."""


class StructuredOutputs(BaseModel):
    """The form that an answer must have. Exactly one of the fields is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    json_schema: dict[str, Any] | str | bool | None = Field(
        default=None, alias="json", description="JSON that fits this schema."
    )
    json_object: bool | None = Field(default=None, description="Any JSON object.")
    regex: str | None = Field(default=None, description="A text that this regular expression matches as a whole.")
    choice: tuple[str, ...] | None = Field(default=None, min_length=1, description="One of these texts.")
    grammar: str | None = Field(default=None, description="A text of this grammar, in Lark's form or in GBNF.")
    thought: Literal["may_come", "begun", "analysis", "analysis_final"] | None = Field(
        default=None,
        description="What must be comes after a thought in `<think>` tags, which may come, or which the prompt has "
        "begun; or after gpt-oss' analysis, by itself or in the final channel. Chats set it where the base thinks.",
    )
    calls: str | None = Field(
        default=None, description="A grammar in Lark's form of calls that may come instead. Chats with tools set it."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        names = type(self).model_fields.keys() - {"thought", "calls"}
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if len(given) + (self.json_schema is False) != 1:
            raise ValueError("needs exactly one of json, json_object, regex, choice and grammar")
        return self

    def kind_and_value(self) -> tuple[GrammarKind, object]:
        """Return the name and the value of the field that is given."""
        if self.json_object:
            return "json", {"type": "object"}
        if self.json_schema is not None:
            return "json", self.json_schema
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "choice", list(self.choice)
        return "grammar", self.grammar


class SamplingParams(BaseModel):
    """Settings of sampling and of the answer's end. Defaults are OpenAI's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens to make; None: as many as fit the model's length."
    )
    min_tokens: int = Field(
        default=0, ge=0, description="Stop tokens and stop strings do not count before this many tokens."
    )
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, description="0 takes the likeliest token.")
    top_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Only the likeliest tokens that together have this share are drawn from.",
    )
    top_k: int = Field(default=0, ge=-1, description="Only so many of the likeliest tokens; 0 or -1: all.")
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Only tokens at least this share as likely as the likeliest."
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="Subtracted from the logit of each token that was made before."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="The same, once for each time that it was made."
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.1,
        le=10.0,
        description="Divides the logit of each token of prompt and answer so far where it is positive, and multiplies "
        "it where it is negative.",
    )
    logit_bias: Annotated[
        dict[TokenIdKey, Annotated[float, Field(ge=-100.0, le=100.0)]], BeforeValidator(_few_biases)
    ] = Field(
        default={},
        max_length=MAX_BIASES,
        description="Added to the logits of these token ids.",
        json_schema_extra={"propertyNames": {"pattern": f"^({_DECIMAL.pattern})$"}},
    )
    seed: (
        Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WithJsonSchema({"type": "integer", "format": "int64"})] | None
    ) = Field(default=None, description="The same seed draws the same answer, whatever else runs.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), max_length=16, description="Strings that end the text; they are not part of it."
    )
    stop_token_ids: tuple[int, ...] = Field(default=(), description="Token ids that end the answer.")
    ignore_eos: bool = Field(default=False, description="Go on over the base's own end tokens.")
    skip_special_tokens: bool = Field(default=True, description="Leave special tokens out of the text.")
    include_stop_str_in_output: bool = Field(
        default=False, description="Keep the stop string, or the stop token, that ended the answer in its text."
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Alternatives to report beside each token; None: no logprobs."
    )
    prompt_logprobs: bool = Field(
        default=False, description="Report logprobs of the prompt's tokens too (`echo` with `logprobs`)."
    )
    num_prompt_tops: int | None = Field(
        default=None, ge=0, le=20, description="Alternatives beside each prompt token; None: as many as `logprobs`."
    )

    structured_outputs: StructuredOutputs | None = Field(default=None, description="What the answer must be.")

    @property
    def has_penalties(self) -> bool:
        """True if a token's logit depends on the tokens before it."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def prompt_tops(self) -> int:
        """Alternatives to report beside each token of the prompt."""
        return (self.logprobs or 0) if self.num_prompt_tops is None else self.num_prompt_tops

    @model_validator(mode="after")
    def _min_within_max(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        return self


class TemplateOptions(BaseModel):
    """Settings of the chat template."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    add_generation_prompt: bool = Field(default=True, description="End with what begins an answer.")
    continue_final_message: bool = Field(default=False, description="Leave the last message open.")
    tools: tuple[dict[str, Any], ...] = Field(default=(), description="Functions that the model may call.")
    variables: dict[str, Any] = Field(default={}, description="Variables of the template's own.")

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> TemplateOptions:
        """Itself, as it is frozen: pydantic copies a default for every request."""
        return self


class GenerateRequest(SamplingParams):
    """A caller's request to the service: `handle.generate.remote(GenerateRequest(model="shout", prompt="Hi"))`.

    Exactly one of `prompt` (text or token ids) and `messages` (rendered by the chat template).
    """

    model: str = Field(min_length=1, description="A base id, an adapter name, or base:adapter.")
    prompt: str | tuple[int, ...] | None = Field(default=None, description="Text or token ids.")
    messages: tuple[dict[str, Any], ...] | None = Field(
        default=None, description="A conversation, for the chat template."
    )
    template: TemplateOptions = Field(
        default=TemplateOptions(), description="How the chat template writes the conversation."
    )
    n: int = Field(default=1, ge=1, le=MAX_N, description="Independent answers to make.")
    lora_path: str | None = Field(
        default=None, description="As SGLang has it: the adapter's name, where `model` names the base or the same."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Put the tokenizer's own tokens (a begin token, say) around the text; None: for `prompt` only.",
    )
    truncate_prompt_tokens: NumKept | None = Field(
        default=None,
        description="Keep only so many tokens of the prompt, the last ones; -1: as many as leave room for the answer.",
    )

    pooling: Pooling | None = Field(
        default=None,
        description="Answer with the prompt's embedding in place of text: the hidden state of its last token, or the "
        "mean of all, as the base's body leaves it.",
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages must be given")
        if self.pooling is not None and (self.n > 1 or self.structured_outputs is not None):
            raise ValueError(f"pooling={self.pooling} makes no text: leave n and structured_outputs out")
        return self


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate, as a worker takes it: prompt tokenised, adapter name resolved to a version."""

    request_id: str
    version: str | None
    """Content digest of the adapter; None: the base model."""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    """KV of prompts is shared by requests of one salt only."""
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end its answer as the base's own do: those of the adapter."""
    vocabulary: int | None = None
    """How many tokens the adapter knows; None: those of the base."""
    pooling: Pooling | None = None
    """Embed the prompt; None: generate."""


class TokenLogprobs(Struct, frozen=True, array_like=True, gc=False):
    """Logprob of one token and of the likeliest alternatives at its place."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob) of the likeliest tokens, best first."""


class GenerateDelta(Struct, frozen=True, array_like=True, gc=False):
    """Text and tokens that one step, or several, added to a sequence. The last one has a finish reason.

    A Struct, for one is made, written and read a token: a dataclass costs some fifty times as much.
    """

    index: int
    """Which of the request's `n` answers."""
    token_ids: tuple[int, ...]
    """The tokens that were added; text of theirs may come with a later delta."""
    text: str
    """Text that is settled: withheld while it may be the start of a stop string or an unfinished character."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One for each token, when asked for."""
    finish_reason: FinishReason | None
    """Why the answer is over; None: it goes on."""
    num_prompt_tokens: int
    """Tokens of the prompt, as the model got it."""
    num_cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With the first delta only, when asked for."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it."""
    worker_id: str = ""
    """The worker that made it."""
    version: str | None = None
    """The version of the adapter that made it; None: the base did."""
    embedding: bytes | None = None
    """Of the prompt, where `pooling` was asked for: little-endian float32."""
    waits_s: tuple[float, float] | None = None
    """With the first token: seconds that the request waited to be admitted, and from then to this token."""

    def then(self, later: GenerateDelta) -> GenerateDelta:
        """Join with the delta that came next."""
        return replace(
            later,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=None if later.logprobs is None else (self.logprobs or ()) + later.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            waits_s=self.waits_s,
        )
