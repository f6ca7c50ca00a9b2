"""The tokens of a base, or of an adapter that has more: texts to token ids, and token ids to texts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase, TokenizersBackend

from lorafleet.adapter_store.manifest import OwnToken
from lorafleet.cluster.errors import BadRequest

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token by itself, as logprobs show it."""

    text: str
    """Its text; `bytes:\\xe2\\x80` where the bytes are no whole character, as OpenAI writes it."""
    utf8: bytes
    is_special: bool
    """Special tokens have a piece, but no text in the answer."""


class Vocabulary:
    """A tokenizer, and how many tokens the model knows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, num_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.longest_token = _longest_token(tokenizer)
        """Bytes of text that one token stands for at most."""
        self._pieces: dict[int, TokenPiece] = {}
        self._decoder = _decoder_of(tokenizer)
        self._encode = None if tokenizer is None else _encoder_of(tokenizer)
        self._added: Mapping[int, Any] = {} if tokenizer is None else dict(tokenizer.added_tokens_decoder)

    def with_own(self, own: Sequence[OwnToken], num_tokens: int) -> Vocabulary:
        """The vocabulary of an adapter. With tokens of its own this copies the tokenizer, which takes a while."""
        tokenizer = self.tokenizer
        if own and tokenizer is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_tokens(
                [
                    AddedToken(
                        token.content,
                        special=token.special,
                        normalized=token.normalized,
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                    )
                    for token in own
                ]
            )
        return Vocabulary(tokenizer, num_tokens)

    def check(self, token_ids: Sequence[int], param: str) -> None:
        """Raise BadRequest when a token id is outside the vocabulary."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.num_tokens):
            wrong = next(token for token in token_ids if not 0 <= token < self.num_tokens)
            raise BadRequest(
                f"{param} has token id {wrong}; the vocabulary is 0 to {self.num_tokens - 1}",
                param,
                "invalid_token_id",
            )

    def encode(self, text: str, param: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text. Raises BadRequest."""
        if self._encode is None:
            raise BadRequest("the base has no tokenizer; send the prompt as token ids", param, "no_tokenizer")
        try:
            return tuple(self._encode(text, add_special_tokens))
        except (UnicodeEncodeError, TypeError) as error:  # the latter from the backend
            raise BadRequest(
                f"{param} has a lone surrogate, which is not a character; send valid Unicode", param
            ) from error

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Text of a prompt that came as token ids, for `echo`."""
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special ones included. Raises BadRequest `no_tokenizer` or `invalid_token_id`."""
        if self.tokenizer is None:
            raise BadRequest("the base has no tokenizer", "tokens", "no_tokenizer")
        self.check(token_ids, "tokens")
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def token_of(self, token_id: int) -> str:
        """The token as the tokenizer spells it."""
        assert self.tokenizer is not None
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

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


def _encoder_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, bool], Sequence[int]]:
    """The way from a text to token ids; the flag adds special tokens.

    The tokenizer's own call hands a single text to threads of the backend, and prepares much that nobody reads: that
    takes several times as long as a short text does. So the backend is asked where the call adds nothing of its own.
    """
    kind = type(tokenizer)
    if not isinstance(tokenizer, TokenizersBackend) or (
        kind.__call__ is not TokenizersBackend.__call__ or kind._encode_plus is not TokenizersBackend._encode_plus
    ):
        return lambda text, special: tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()

    def encode(text: str, special: bool) -> Sequence[int]:
        token_ids: list[int] = backend.encode(text, add_special_tokens=special).ids
        return token_ids

    return encode


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
