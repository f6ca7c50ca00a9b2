"""Turns what a caller sends into token ids, and token ids back into the text that logprobs show.

Owns the tokenizer and its rules (special tokens, chat template); the worker turns answers into text.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafleet.adapter_store.manifest import AdapterChat
from lorafleet.cluster.errors import BadRequest, ContextLengthExceeded
from lorafleet.cluster.http.auth import CALLER
from lorafleet.cluster.http.incoming import MAX_BODY_BYTES, Bounds
from lorafleet.cluster.serving.answer_formats import TEXT_ONLY, AnswerFormat
from lorafleet.cluster.serving.fair_threads import FairThreads
from lorafleet.cluster.serving.time_limit import within
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

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token by itself, as logprobs show it."""

    text: str
    """Its text; `bytes:\\xe2\\x80` where the bytes are no whole character, as OpenAI writes it."""
    utf8: bytes
    is_special: bool
    """Special tokens have a piece, but no text in the answer."""


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
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._grammars = Grammars(tokenizer, vocab_size=vocab_size)
        self._compiling = asyncio.Semaphore(MAX_COMPILING)
        self.threads = FairThreads(NUM_THREADS, "prompts")
        """Parse, render and tokenise what is long."""
        self._longest_token = _longest_token(tokenizer)
        self._pieces: dict[int, TokenPiece] = {}
        self._decoder = _decoder_of(tokenizer)
        self._added: Mapping[int, Any] = {} if tokenizer is None else dict(tokenizer.added_tokens_decoder)

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

    async def tokenize(
        self,
        request: GenerateRequest,
        chat: AdapterChat | None = None,
        vocabulary: int | None = None,
        param: str | None = None,
    ) -> tuple[int, ...]:
        """Token ids of the request's prompt, checked against the vocabulary and the model's length.

        chat: how the adapter's conversations are written. vocabulary: how many tokens it knows, if not the base's.
        param: the field of the prompt, for errors.

        Raises BadRequest (`empty_prompt`, `invalid_token_id`, `no_tokenizer`, `no_chat_template`,
        `chat_template_failed`) or ContextLengthExceeded.
        """
        if request.messages is not None:
            param = param or "messages"
            text = await self.render(request.messages, request.template, chat)
            self._check_text(text, request, param)
            token_ids = await self.encode(
                text,
                param,
                add_special_tokens=bool(request.add_special_tokens),
            )
        elif isinstance(request.prompt, str):
            param = param or "prompt"
            self._check_text(request.prompt, request, param)
            token_ids = await self.encode(
                request.prompt, param, add_special_tokens=request.add_special_tokens is not False
            )
        else:
            assert request.prompt is not None
            param = param or "prompt"
            token_ids = request.prompt
            self.check_token_ids(token_ids, param, vocabulary)
        if not token_ids:
            raise BadRequest(f"{param} has no tokens; it must have at least one", param, "empty_prompt")
        token_ids = self._truncated(token_ids, request)
        self._check_length(len(token_ids), request.max_tokens, param)
        self.check_token_ids(request.stop_token_ids, "stop_token_ids", vocabulary)
        self.check_token_ids(tuple(request.logit_bias), "logit_bias", vocabulary)
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

    def check_token_ids(self, token_ids: Sequence[int], param: str, vocabulary: int | None = None) -> None:
        """Raise BadRequest when a token id is outside the vocabulary, which is the base's if none is given."""
        num_tokens = vocabulary or self.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < num_tokens):
            wrong = next(token for token in token_ids if not 0 <= token < num_tokens)
            raise BadRequest(
                f"{param} has token id {wrong}; the vocabulary is 0 to {num_tokens - 1}",
                param,
                "invalid_token_id",
            )

    def begins_thought(self, token_ids: Sequence[int]) -> bool:
        """True if a prompt ends with the tag that begins a thought."""
        return self.decode(token_ids[-_TAG_TOKENS:]).rstrip().endswith("<think>")

    def room_for(self, num_prompt_tokens: int) -> int:
        """Most tokens that an answer to such a prompt may have."""
        return self.max_model_len - num_prompt_tokens

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Text of a prompt that came as token ids, for `echo`."""
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def piece(self, token_id: int) -> TokenPiece:
        """The token by itself; kept, so there are at most as many as the vocabulary has."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def _make_piece(self, token_id: int) -> TokenPiece:
        added = self._added.get(token_id)
        if added is not None:
            return TokenPiece(added.content, added.content.encode(), added.special)
        token = self.tokenizer.convert_ids_to_tokens(token_id) if self.tokenizer is not None else None
        if not isinstance(token, str):
            return TokenPiece("", b"", is_special=False)
        utf8 = _bytes_of(token, self._decoder)
        try:
            return TokenPiece(utf8.decode(), utf8, is_special=False)
        except UnicodeDecodeError:
            return TokenPiece("bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8), utf8, is_special=False)

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
        self, text: str, param: str, *, add_special_tokens: bool, may_be_empty: bool = False
    ) -> tuple[int, ...]:
        """Token ids of a text. Raises BadRequest."""
        if not (text or may_be_empty):
            raise BadRequest(f"{param} must not be empty", param, "empty_prompt")
        if len(text) <= LONG_TEXT:
            return self._encode_now(text, param, add_special_tokens)
        return await self.threads.run(CALLER.get(), self._encode_now, text, param, add_special_tokens)

    def _encode_now(self, text: str, param: str, add_special_tokens: bool) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise BadRequest("the base has no tokenizer; send the prompt as token ids", param, "no_tokenizer")
        try:
            encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        except UnicodeEncodeError as error:
            raise BadRequest(
                f"{param} has a lone surrogate, which is not a character; send valid Unicode", param
            ) from error
        return tuple(encoded["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special ones included. Raises BadRequest `no_tokenizer` or `invalid_token_id`."""
        if self.tokenizer is None:
            raise BadRequest("the base has no tokenizer", "tokens", "no_tokenizer")
        self.check_token_ids(token_ids, "tokens")
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def token_of(self, token_id: int) -> str:
        """The token as the tokenizer spells it."""
        assert self.tokenizer is not None
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    @property
    def bounds(self) -> Bounds:
        """Of the bodies that this base has a use for: a prompt of its longest tokens, with each byte escaped."""
        longest = 6 * self.max_model_len * self._longest_token
        return Bounds(
            max_bytes=min(MAX_BODY_BYTES, LEAST_BODY_BYTES + longest),
            max_values=min(2**14 + 16 * self.max_model_len, 2**18 + self.max_model_len),
        )

    def _check_text(self, text: str, request: GenerateRequest, param: str) -> None:
        """Refuse a text that cannot fit, before it is tokenised: no token is longer than the longest."""
        most = self.max_model_len * self._longest_token
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
                f"{param} has {num_prompt_tokens} and the answer asks for {asked}",
                param,
            )


def _longest_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Bytes of text that one token stands for at most.

    A normalizer may make text shorter, and an unknown word may be one token however long: where there is a normalizer
    other than of bytes it counts four times, and at least 64 bytes.
    """
    if tokenizer is None:
        return 64
    longest = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)
    return longest if "ByteLevel" in _decoder_of(tokenizer) else 4 * max(longest, 16)


def _decoder_of(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Description of the tokenizer's decoder, which says how its tokens are spelled; empty when unknown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    return "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False)


def _bytes_of(token: str, decoder: str) -> bytes:
    if "ByteLevel" in decoder:
        try:
            return bytes(_BYTES_OF_LETTERS[letter] for letter in token)
        except KeyError:
            return token.encode()
    if "ByteFallback" in decoder and (match := _BYTE_FALLBACK.fullmatch(token)):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode() if "▁" in decoder else token.encode()


def _bytes_of_letters() -> dict[str, int]:
    """Map the letters of byte-level tokenizers to bytes: printable bytes are themselves, others follow U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES_OF_LETTERS = _bytes_of_letters()
