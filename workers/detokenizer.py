"""Turns tokens into text as they come, and finds stop strings in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafleet.adapter_store.manifest import OwnToken

OwnTexts = Mapping[int, OwnToken]
"""An adapter's own tokens, by id."""

REPLACEMENT = "\ufffd"
"""What an unfinished multi-byte character decodes to."""
LEFT_CONTEXT = 6
"""Prompt tokens in front of the answer that are decoded with it: how a token reads depends on its left neighbours."""
MAX_CONTEXT = 24
"""Beyond it the context is cut, so that the cost of a token does not grow with the answer."""
MAX_CHARACTER_TOKENS = 4
"""A character has at most four bytes: so many tokens later it is finished, or broken for good."""


@dataclass(slots=True)
class Detokenizer:
    """Settled text of one answer.

    Text is withheld while it may change: the bytes of an unfinished character, and a tail that may begin a stop string.
    Special tokens have no text, unless `keeps_special`.
    """

    tokenizer: PreTrainedTokenizerBase | None
    stop: tuple[str, ...]
    prompt_token_ids: tuple[int, ...]
    keeps_special: bool = False
    keeps_stop: bool = False
    """The stop string that ends the text is part of it."""
    own_tokens: OwnTexts = field(default_factory=dict)
    """Of the adapter."""
    matched_stop: str | None = None
    _context: list[int] | None = None
    _num_settled: int = 0
    """Tokens of the context whose text is settled."""
    _settled: str = ""
    """Their text."""
    _withheld: str = ""

    def append(self, token_ids: tuple[int, ...], *, check_stop: bool) -> str:
        """Take new tokens and return the text that settled. `matched_stop` is set when a stop string came."""
        if self.tokenizer is None:
            return ""
        if self._context is None:
            self._context = list(self.prompt_token_ids[-LEFT_CONTEXT:])
            self._num_settled, self._settled = len(self._context), self._decode(self._context)
        special = frozenset[int]() if self.keeps_special else _special_ids(self.tokenizer)
        self._context += [token_id for token_id in token_ids if token_id not in special and self._has_text(token_id)]
        whole = self._decode(self._context)
        text = ""
        if whole == self._settled:
            del self._context[self._num_settled :]  # they say nothing, and would be decoded with each token to come
        elif not whole.endswith(REPLACEMENT):
            if len(whole) > len(self._settled):
                text = self._settle(self._context, len(self._context), whole)
        elif len(self._context) - self._num_settled > 3 * MAX_CHARACTER_TOKENS:
            text = self._settle_broken(self._context, whole)
        return self._release(text, check_stop) if text else ""

    def flush(self) -> str:
        """Return the withheld text at the end of the answer."""
        if self.tokenizer is None or self.matched_stop is not None:
            return ""
        text, self._withheld = self._withheld, ""
        if self._context is not None:
            text += self._decode(self._context)[len(self._settled) :]
        return text

    def _settle(self, context: list[int], num_tokens: int, text: str) -> str:
        """The first `num_tokens` of the context read `text`, whatever comes; return what of it is new."""
        new, num_old = text[len(self._settled) :], self._num_settled
        if num_tokens > MAX_CONTEXT:
            # Where a text was settled a character begins, so the cut splits none.
            self._context = context[num_old:]
            num_tokens -= num_old
            text = self._decode(self._context[:num_tokens])
        self._num_settled, self._settled = num_tokens, text
        return new

    def _settle_broken(self, context: list[int], whole: str) -> str:
        """Let go of bytes that are no characters, so that they do not pile up."""
        last = len(context) - MAX_CHARACTER_TOKENS
        for num_tokens in range(last, last - MAX_CHARACTER_TOKENS, -1):
            text = self._decode(context[:num_tokens])
            if whole.startswith(text) and len(text) > len(self._settled):
                return self._settle(context, num_tokens, text)
        return ""

    def _release(self, text: str, check_stop: bool) -> str:
        text = self._withheld + text
        self._withheld = ""
        if not self.stop or not check_stop:
            return text
        found = min(((text.find(stop), stop) for stop in self.stop if stop in text), default=None)
        if found is not None:
            self.matched_stop = found[1]
            return text[: found[0] + len(found[1])] if self.keeps_stop else text[: found[0]]
        keep = max(_overlap(text, stop) for stop in self.stop)
        if keep:
            text, self._withheld = text[:-keep], text[-keep:]
        return text

    def _has_text(self, token_id: int) -> bool:
        own = self.own_tokens.get(token_id)
        return own is None or self.keeps_special or not own.special

    def _decode(self, token_ids: list[int]) -> str:
        assert self.tokenizer is not None
        if self.own_tokens and not self.own_tokens.keys().isdisjoint(token_ids):
            token_ids = [token_id for token_id in token_ids if self._has_text(token_id)]  # the prompt has them all
            return decoded_with(self.own_tokens, token_ids, self.tokenizer, skips_special=not self.keeps_special)
        return _decoder_of(self.tokenizer, not self.keeps_special)(token_ids)


@lru_cache(maxsize=256)
def own_texts(tokens: tuple[OwnToken, ...]) -> OwnTexts:
    """The tokens by id."""
    return {token.id: token for token in tokens}


def decoded_with(
    own: OwnTexts, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, skips_special: bool
) -> str:
    """The text of tokens of which some are an adapter's own, all of them shown: as its own tokenizer would decode them.

    That is how tokenizers decodes: what each token is called, through the tokenizer's decoder.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        texts = (
            "".join(own[token_id].content for token_id in run) if is_own else _decoder_of(tokenizer, skips_special)(run)
            for is_own, run in ((is_own, list(run)) for is_own, run in groupby(token_ids, own.__contains__))
        )
        return "".join(texts)
    special = _special_ids(tokenizer) if skips_special else frozenset()
    named = (
        own[token_id].content if token_id in own else backend.id_to_token(token_id)
        for token_id in token_ids
        if token_id not in special
    )
    tokens = [token for token in named if token is not None]
    return " ".join(tokens) if backend.decoder is None else str(backend.decoder.decode(tokens))


@lru_cache(maxsize=8)
def _decoder_of(tokenizer: PreTrainedTokenizerBase, skips_special: bool) -> Callable[[list[int]], str]:
    """Decodes, with special tokens or without. Transformers' way is the same for most, at several times the cost."""
    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if isinstance(tokenizer, plain) and kind.decode is plain.decode and kind._decode is plain._decode:
        backend: Tokenizer = tokenizer.backend_tokenizer
        return partial(backend.decode, skip_special_tokens=skips_special)
    return partial(tokenizer.decode, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
    return frozenset(token_id for token_id, token in added.items() if token.special)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
