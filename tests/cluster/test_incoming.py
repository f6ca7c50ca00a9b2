"""Bodies that are too large, have too many values, or come too slowly, while others are served."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cluster.http.incoming import Bounds, ValueCounter
from tests.cluster.serving import BASE_ID, Service, serving

SMALL = Bounds(max_bytes=100_000, max_values=1_000, pause_s=0.3, whole_s=1.0)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a",[]{}\\:\u00e9', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='x",\\', max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


def count_of(value: object) -> int:
    """Commas between values, and one for each list and object."""
    if isinstance(value, dict):
        return 1 + max(0, len(value) - 1) + sum(map(count_of, value.values()))
    return 1 + max(0, len(value) - 1) + sum(map(count_of, value)) if isinstance(value, list) else 0


@given(value=JSON, cuts=st.lists(st.integers(0, 400), max_size=8), ascii_only=st.booleans())
def test_values_are_counted_wherever_the_text_is_cut(value: object, cuts: list[int], ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
    counter = ValueCounter()
    for start, end in pairwise(bounds):
        counter.feed(raw[start:end])
    assert counter.count == count_of(value)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [5] * 1_100},
        {"messages": [{"role": "user", "content": "a"}] * 400},
        {"prompt": "a", "logit_bias": {str(i): 1 for i in range(1_100)}},
        {"prompt": "a", "x": [[[]]] * 500},
    ],
)
def test_too_many_values_are_refused_while_they_come(body: dict[str, object]) -> None:
    with serving(Service(bounds=SMALL)) as service, service.http() as http:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            reply = http.post(path, json={"model": BASE_ID, **body})
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
            assert "over 1000 values" in reply.json()["error"]["message"]


def test_a_long_text_with_commas_is_one_value() -> None:
    with serving(Service(bounds=SMALL)) as service, service.http() as http:
        reply = http.post("/tokenize", json={"model": BASE_ID, "prompt": '[{,"' * 10_000})
        assert reply.status_code == 200


@pytest.mark.parametrize("drips", [False, True])
def test_half_a_body_is_closed_in_time(drips: bool) -> None:
    with serving(Service(bounds=SMALL)) as service:
        began_s = time.monotonic()
        with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=20) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
            reply = b""
            while b"\r\n\r\n" not in reply:
                connection.settimeout(0.1 if drips else 20)
                try:
                    piece = connection.recv(4096)
                    assert piece, "closed without a reply"
                    reply += piece
                except TimeoutError:
                    connection.sendall(b" ")
        assert b"408" in reply.partition(b"\r\n")[0]
        assert time.monotonic() - began_s < 15
        assert httpx.get(f"{service.url}/healthz").status_code == 200


async def test_a_text_that_cannot_fit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    prompts = service.prompts
    monkeypatch.setattr(type(prompts.vocabulary), "encode", lambda *_, **__: pytest.fail("it was tokenised"))
    with serving(service), service.http() as http:
        text = "a" * (prompts.max_model_len * prompts.vocabulary.longest_token + 1)
        for path, body in (
            ("/v1/completions", {"prompt": text}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ):
            reply = await asyncio.to_thread(http.post, path, json={"model": BASE_ID, **body})
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_the_longest_prompt_of_the_longest_tokens_is_within_the_bounds() -> None:
    prompts = Service().prompts
    assert prompts.tokenizer is not None
    longest = max((prompts.vocabulary.piece(i).text for i in range(prompts.vocab_size)), key=len)
    raw = json.dumps({"model": BASE_ID, "prompt": longest * prompts.max_model_len, "max_tokens": 1}).encode()
    assert len(raw) < prompts.bounds.max_bytes
    ids = json.dumps({"model": BASE_ID, "prompt": [[5] * prompts.max_model_len] * 16}).encode()
    assert ValueCounter().feed(ids) < prompts.bounds.max_values
