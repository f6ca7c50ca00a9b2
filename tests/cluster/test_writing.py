"""Long replies in pieces are the same JSON."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cluster.openai.writing import PIECE, in_pieces, to_json, written

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@given(value=VALUES, depth=st.integers(0, 4))
def test_the_pieces_are_the_whole(value: object, depth: int) -> None:
    assert "".join(in_pieces(value, depth)) == to_json(value)


def test_no_piece_is_long() -> None:
    vector = [0.5] * 5000
    reply = {"object": "list", "data": [{"index": n, "embedding": vector} for n in range(3)], "usage": {"n": 3}}
    pieces = list(in_pieces(reply))
    assert "".join(pieces) == to_json(reply)
    assert max(map(len, pieces)) < 5 * PIECE
    tokens = {"tokens": list(range(10_000))}
    assert json.loads(written(tokens, depth=1)) == tokens
    assert max(map(len, in_pieces(tokens, 1))) < 7 * PIECE
