"""An event as text around its blanks: most tokens of a stream differ in their text and ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from json.encoder import encode_basestring_ascii

TEXT = "\x00text\x00"
TOKEN_ID = -987_654_321
"""What stands for text and token id in the event that a template is made of; no model says either."""


class EventTemplate:
    """Makes the events that differ from one only in their text and, where that has any, their token ids."""

    __slots__ = ("_head", "_middle", "_tail")

    def __init__(self, event: bytes) -> None:
        """event: one that says `TEXT`, and behind it `TOKEN_ID` if it has token ids."""
        self._head, rest = event.decode().split(encode_basestring_ascii(TEXT))
        self._middle, *tail = rest.split(str(TOKEN_ID))
        self._tail: str | None = tail[0] if tail else None

    def event(self, text: str, token_ids: Sequence[int]) -> bytes:
        """The event with this text and these token ids."""
        event = self._head + encode_basestring_ascii(text) + self._middle
        if self._tail is not None:
            event += ",".join(map(str, token_ids)) + self._tail
        return event.encode()
