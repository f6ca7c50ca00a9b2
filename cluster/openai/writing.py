"""Long replies as JSON: written on a thread, and in pieces, since each call of the encoder keeps the interpreter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

PIECE = 256
"""Elements of a list that are written in one call."""
DEPTH = 3
"""Levels of a reply whose parts are written one by one: itself, its list of answers, and an answer."""

to_json = json.JSONEncoder(separators=(",", ":")).encode


def in_pieces(value: Any, depth: int = DEPTH) -> Iterator[str]:
    """Cut what `to_json` returns: no piece takes longer than `PIECE` elements of a list do."""
    if depth and isinstance(value, dict) and value:
        for number, (key, each) in enumerate(value.items()):
            yield f"{',' if number else '{'}{to_json(key)}:"
            yield from in_pieces(each, depth - 1)
        yield "}"
    elif depth and isinstance(value, list) and value:
        for number, each in enumerate(value):
            yield "," if number else "["
            yield from in_pieces(each, depth - 1)
        yield "]"
    elif isinstance(value, list) and len(value) > PIECE:
        for first in range(0, len(value), PIECE):
            yield f"{',' if first else '['}{to_json(value[first : first + PIECE])[1:-1]}"
        yield "]"
    else:
        yield to_json(value)


def written(value: Any, depth: int = DEPTH) -> bytes:
    """The bytes of a reply that may be long."""
    return "".join(in_pieces(value, depth)).encode()
