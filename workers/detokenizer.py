"""Turns tokens into text as they come, and finds stop strings in it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What an unfinished multi-byte character decodes to."""


@dataclass(slots=True)
class Detokenizer:
    """Settled text of one answer.

    Text is withheld while it may change: the bytes of an unfinished character, and a tail that may begin a stop string.
    """

    tokenizer: PreTrainedTokenizerBase | None
    stop: tuple[str, ...]
    prompt_token_ids: tuple[int, ...]
    """Decoded in front of the first tokens, since how a token reads depends on its left neighbours."""
    matched_stop: str | None = None
    _context: list[int] | None = None
    _num_settled: int = 0
    _withheld: str = ""

    def append(self, token_ids: tuple[int, ...], *, check_stop: bool) -> str:
        """Take new tokens and return the text that settled. `matched_stop` is set when a stop string came."""
        if self.tokenizer is None:
            return ""
        if self._context is None:
            self._context = list(self.prompt_token_ids[-6:])
            self._num_settled = len(self._context)
        self._context.extend(token_ids)
        settled = self._decode(self._context[: self._num_settled])
        whole = self._decode(self._context)
        if whole.endswith(REPLACEMENT) or len(whole) <= len(settled):
            return ""
        # Keep a short left context only: the cost of a token does not grow with the answer.
        self._context = self._context[self._num_settled :] if self._num_settled else self._context
        self._num_settled = len(self._context)
        return self._release(whole[len(settled) :], check_stop)

    def flush(self) -> str:
        """What was withheld, once nothing more will come."""
        if self.tokenizer is None or self.matched_stop is not None:
            return ""
        text = self._withheld
        self._withheld = ""
        if self._context and self._num_settled < len(self._context):
            text += self._decode(self._context)[len(self._decode(self._context[: self._num_settled])) :]
        return text

    def _release(self, text: str, check_stop: bool) -> str:
        text = self._withheld + text
        self._withheld = ""
        if not self.stop or not check_stop:
            return text
        found = min(((text.find(stop), stop) for stop in self.stop if stop in text), default=None)
        if found is not None:
            self.matched_stop = found[1]
            return text[: found[0]]
        keep = max(_overlap(text, stop) for stop in self.stop)
        if keep:
            text, self._withheld = text[:-keep], text[-keep:]
        return text

    def _decode(self, token_ids: list[int]) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
