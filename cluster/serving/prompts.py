"""Turns what a caller sends into token ids: its bounds, its chat template, and the vocabulary that reads it.

The worker turns answers into text.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafleet.adapter_store.manifest import AdapterChat, OwnToken
from lorafleet.cluster.errors import BadRequest, ContextLengthExceeded
from lorafleet.cluster.http.auth import CALLER
from lorafleet.cluster.http.incoming import MAX_BODY_BYTES, Bounds
from lorafleet.cluster.serving.answer_formats import TEXT_ONLY, AnswerFormat
from lorafleet.cluster.serving.fair_threads import FairThreads
from lorafleet.cluster.serving.time_limit import within
from lorafleet.cluster.serving.vocabulary import Vocabulary
from lorafleet.workers.checkpoint import load_tokenizer, max_model_len, read_config
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import GrammarRefused
from lorafleet.workers.grammars import Grammars
from lorafleet.workers.request import GenerateRequest, StructuredOutputs, TemplateOptions

TEMPLATE_S = 2.0
"""How long an adapter's chat template may take."""
COMPILE_S = 5.0
"""How long a grammar may take to compile; llguidance's own bounds end what goes on in its thread after that."""
MAX_COMPILING = 16
"""Grammars that are compiled at once, each on a thread of its own."""
_TAG_TOKENS = 12
"""Tokens at a prompt's end that have any tag in them."""
LONG_TEXT = 4096
"""Characters above which rendering and tokenising leave the event loop, so that other streams go on."""
NUM_THREADS = 4
LEAST_BODY_BYTES = 2**20
"""A body may have so many bytes beside the prompt."""

MAX_VOCABULARIES = 8
"""Most adapters' own vocabularies that are kept; each has a copy of the base's tokenizer, of some 10 to 100 MB."""


class Prompts:
    """The tokenizer of one base, and the bounds that a prompt must keep."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        vocab_size: int,
        max_model_len: int,
        answers: AnswerFormat = TEXT_ONLY,
    ) -> None:
        self.answers = answers
        self.vocabulary = Vocabulary(tokenizer, vocab_size)
        """The base's."""
        self._own: OrderedDict[tuple[tuple[OwnToken, ...], int], asyncio.Future[Vocabulary]] = OrderedDict()
        self.max_model_len = max_model_len
        self._grammars = Grammars(tokenizer, vocab_size=vocab_size)
        self._compiling = asyncio.Semaphore(MAX_COMPILING)
        self.threads = FairThreads(NUM_THREADS, "prompts")
        """Parse, render and tokenise what is long."""

    @classmethod
    def load(cls, model: ModelConfig) -> Prompts:
        """The tokenizer and the bounds of the base at `model.source`, read without its weights."""
        config = read_config(model)
        tokenizer = load_tokenizer(model.source)
        return cls(
            tokenizer,
            answers=AnswerFormat.of(model, getattr(tokenizer, "response_template", None)),
            vocab_size=config.vocab_size,
            max_model_len=max_model_len(model, config),
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base's."""
        return self.vocabulary.tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens that the base knows."""
        return self.vocabulary.num_tokens

    async def vocabulary_of(self, chat: AdapterChat | None, num_tokens: int | None) -> Vocabulary:
        """The vocabulary of an adapter, given its own tokens and how many it knows in all, if not the base's."""
        key = (() if chat is None else chat.own_tokens, num_tokens or self.vocab_size)
        if key == ((), self.vocab_size):
            return self.vocabulary
        found = self._own.get(key)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            found = self._own[key] = asyncio.ensure_future(asyncio.to_thread(self.vocabulary.with_own, *key))
            while len(self._own) > MAX_VOCABULARIES:
                self._own.popitem(last=False)
        self._own.move_to_end(key)
        return await asyncio.shield(found)

    async def tokenize(
        self,
        request: GenerateRequest,
        chat: AdapterChat | None = None,
        vocabulary: Vocabulary | None = None,
        param: str | None = None,
    ) -> tuple[int, ...]:
        """Token ids of the request's prompt, checked against the vocabulary and the model's length.

        chat: how the adapter's conversations are written. vocabulary: the adapter's, as `vocabulary_of` gives it.
        param: the field of the prompt, for errors.

        Raises BadRequest (`empty_prompt`, `invalid_token_id`, `no_tokenizer`, `no_chat_template`,
        `chat_template_failed`) or ContextLengthExceeded.
        """
        vocabulary = vocabulary or self.vocabulary
        if request.messages is not None:
            param = param or "messages"
            text = await self.render(request.messages, request.template, chat)
            self._check_text(text, request, param, vocabulary)
            token_ids = await self.encode(
                text, param, add_special_tokens=bool(request.add_special_tokens), vocabulary=vocabulary
            )
        elif isinstance(request.prompt, str):
            param = param or "prompt"
            self._check_text(request.prompt, request, param, vocabulary)
            token_ids = await self.encode(
                request.prompt,
                param,
                add_special_tokens=request.add_special_tokens is not False,
                vocabulary=vocabulary,
            )
        else:
            assert request.prompt is not None
            param = param or "prompt"
            token_ids = request.prompt
            vocabulary.check(token_ids, param)
        if not token_ids:
            raise BadRequest(f"{param} has no tokens; it must have at least one", param, "empty_prompt")
        token_ids = self._truncated(token_ids, request)
        self._check_length(len(token_ids), request.max_tokens, param)
        vocabulary.check(request.stop_token_ids, "stop_token_ids")
        vocabulary.check(tuple(request.logit_bias), "logit_bias")
        return token_ids

    async def check_grammar(self, asked: StructuredOutputs | None) -> None:
        """Compile what an answer must be, on a thread. Raises BadRequest `grammar_refused`, which says why."""
        if asked is None:
            return
        kind, _ = asked.kind_and_value()
        try:
            async with self._compiling:
                await within(COMPILE_S, partial(self._grammars.matcher, asked))
        except TimeoutError:
            message = f"this {kind} takes over {COMPILE_S:g} s to compile"
            raise BadRequest(message, "structured_outputs", GrammarRefused.code) from None
        except GrammarRefused as error:
            raise BadRequest(f"this {kind} cannot be compiled: {error}", "structured_outputs", error.code) from error

    def begins_thought(self, token_ids: Sequence[int], vocabulary: Vocabulary) -> bool:
        """True if a prompt ends with the tag that begins a thought."""
        return vocabulary.decode(token_ids[-_TAG_TOKENS:]).rstrip().endswith("<think>")

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: TemplateOptions = TemplateOptions(),  # noqa: B008 (frozen)
        chat: AdapterChat | None = None,
    ) -> str:
        """A conversation as the chat template writes it: the adapter's own, or the base's. Raises BadRequest.

        An adapter's template gets a thread and `TEMPLATE_S`: it is a program, and whoever trains adapters wrote it.
        """
        own = None if chat is None else chat.template
        if self.tokenizer is None or not (own or self.tokenizer.chat_template):
            raise BadRequest(
                "the base has no chat template; use completions with a prompt", "messages", "no_chat_template"
            )
        if not messages:
            raise BadRequest("messages must not be empty", "messages", "empty_prompt")
        if own is None or own == self.tokenizer.chat_template:
            num_letters = sum(len(str(message.get("content") or "")) for message in messages)
            if num_letters <= LONG_TEXT and len(messages) <= LONG_TEXT // 64:
                return self._render(messages, options, None)
            return await self.threads.run(CALLER.get(), self._render, messages, options, None)
        try:
            return await within(TEMPLATE_S, partial(self._render, messages, options, own))
        except TimeoutError:
            raise BadRequest(
                f"the adapter's chat template took over {TEMPLATE_S:g} s on these messages",
                "messages",
                "chat_template_failed",
            ) from None

    def _render(self, messages: Sequence[Mapping[str, Any]], options: TemplateOptions, own: str | None) -> str:
        assert self.tokenizer is not None
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                chat_template=own,
                tools=[dict(tool) for tool in options.tools] or None,
                **options.variables,
            )
        # A template is a program of the base's author: it raises what it likes.
        except Exception as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise BadRequest(
                f"the {'base' if own is None else 'adapter'}'s chat template refuses these messages: {reason}",
                "messages",
                "chat_template_failed",
            ) from error
        assert isinstance(text, str)
        return text

    def _truncated(self, token_ids: tuple[int, ...], request: GenerateRequest) -> tuple[int, ...]:
        limit = request.truncate_prompt_tokens
        if limit is None:
            return token_ids
        room = self.max_model_len - (request.max_tokens or 1)
        return token_ids[-max(1, room if limit == -1 else limit) :]

    async def encode(
        self,
        text: str,
        param: str,
        *,
        add_special_tokens: bool,
        may_be_empty: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a text, long ones on a thread. Raises BadRequest."""
        encode = partial((vocabulary or self.vocabulary).encode, text, param, add_special_tokens=add_special_tokens)
        if not (text or may_be_empty):
            raise BadRequest(f"{param} must not be empty", param, "empty_prompt")
        if len(text) <= LONG_TEXT:
            return encode()
        return await self.threads.run(CALLER.get(), encode)

    @property
    def bounds(self) -> Bounds:
        """Of the bodies that this base has a use for: a prompt of its longest tokens, with each byte escaped."""
        longest = 6 * self.max_model_len * self.vocabulary.longest_token
        return Bounds(
            max_bytes=min(MAX_BODY_BYTES, LEAST_BODY_BYTES + longest),
            max_values=min(2**14 + 16 * self.max_model_len, 2**18 + self.max_model_len),
        )

    def _check_text(self, text: str, request: GenerateRequest, param: str, vocabulary: Vocabulary) -> None:
        """Refuse a text that cannot fit, before it is tokenised: no token is longer than the longest."""
        most = self.max_model_len * vocabulary.longest_token
        if request.truncate_prompt_tokens is None and len(text) > most:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_model_len} tokens, which is at most {most} "
                f"characters; {param} has {len(text)}",
                param,
            )

    def _check_length(self, num_prompt_tokens: int, max_tokens: int | None, param: str) -> None:
        asked = 1 if max_tokens is None else max_tokens
        if num_prompt_tokens + asked > self.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_model_len} tokens; "
                f"{param} has {num_prompt_tokens} tokens and the answer asks for {asked}",
                param,
            )
