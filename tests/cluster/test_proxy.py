"""An ingress that is lost, as the middleware in Serve's proxy sees it: the proxy returns without a whole answer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from lorafleet.cluster.anthropic.replies import error_of
from lorafleet.cluster.errors import BodyTooSlow, IngressLost, StreamBroken, describe
from lorafleet.cluster.http import proxy
from lorafleet.cluster.http.proxy import MAX_ATTEMPTS, MAX_KEPT_BYTES, LostIngress, broken_event
from tests.cluster.test_heads import echo
from tests.support.wait import until

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
EVENT: Message = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
END: Message = {"type": "http.response.body", "body": b""}
BODY = [b'{"model": ', b'"tiny"}']


class Proxy:
    """Serve's proxy in front of ingresses, of which each takes one call: it sends these messages and is lost."""

    def __init__(self, *answers: list[Message]) -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"].append((b"x-request-id", b"1"))  # as Serve's own middleware does
        assert len(scope["headers"]) == 1
        body, is_more = b"", True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            is_more = message["more_body"]
        self.bodies.append(body)
        for message in self.answers.pop(0):
            await send(message)


async def call(
    app: Proxy, path: str = "/v1/completions", method: str = "POST", pieces: list[bytes] | None = None
) -> list[Message]:
    """The messages that a client gets."""
    sent: list[Message] = []
    pieces = BODY if pieces is None else pieces
    messages: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
        for number, piece in enumerate(pieces, start=1)
    ]
    messages.append({"type": "http.disconnect"})

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await LostIngress(app)({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
    return sent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "RETRY_PAUSE_S", 0.0)


def error_in(messages: list[Message]) -> Any:
    assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]
    assert messages[0]["status"] == 503
    return json.loads(messages[1]["body"])


async def test_a_whole_answer_passes_as_it_is() -> None:
    assert await call(Proxy([START, EVENT, END])) == [START, EVENT, END]


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_request_without_an_answer_goes_to_another_ingress(method: str) -> None:
    app = Proxy([], [START, EVENT, END])
    assert await call(app, method=method) == [START, EVENT, END]
    assert app.bodies == [b"".join(BODY)] * 2


async def test_in_the_end_the_client_is_told() -> None:
    app = Proxy([], [], [])
    told = error_in(await call(app))
    assert len(app.bodies) == MAX_ATTEMPTS
    message = "the ingress was lost before it answered; a change that was under way may have been made"
    assert told == json.loads(describe(IngressLost(message)).body())


@pytest.mark.parametrize(
    ("path", "method", "pieces"),
    [
        ("/admin/v1/adapters/x", "PUT", BODY),
        ("/v1/load_lora_adapter", "POST", BODY),
        ("/v1/completions", "POST", [b"x" * MAX_KEPT_BYTES, b"y"]),
    ],
    ids=["a change", "a peer's change", "a long body"],
)
async def test_what_changes_something_or_is_long_is_not_sent_twice(path: str, method: str, pieces: list[bytes]) -> None:
    app = Proxy([])
    assert error_in(await call(app, path, method, pieces))["error"]["code"] == "ingress_lost"
    assert len(app.bodies) == 1


@pytest.mark.parametrize(
    ("path", "body_of"),
    [
        ("/v1/completions", lambda reply: json.loads(reply.body())),
        ("/v1/messages", lambda reply: {"type": "error", "error": error_of(reply)}),
        (
            "/v1/responses",
            lambda reply: {"type": "error", "code": reply.code, "message": reply.message, "param": reply.param},
        ),
    ],
)
async def test_a_begun_stream_ends_with_the_error_event_of_its_route(path: str, body_of: Callable[[Any], Any]) -> None:
    app = Proxy([START, EVENT])
    *begun, last = await call(app, path)
    assert begun == [START, EVENT]
    assert not last.get("more_body", False)
    assert last["body"] == broken_event(path)
    data = next(line for line in last["body"].splitlines() if line.startswith(b"data: "))
    reply = describe(StreamBroken("the ingress was lost in the middle of the answer"))
    assert json.loads(data.removeprefix(b"data: ")) == body_of(reply)


async def test_another_answer_stays_cut() -> None:
    start = {**START, "headers": [(b"content-type", b"application/json")]}
    assert await call(Proxy([start, EVENT])) == [start, EVENT]


async def test_a_client_that_left_is_told_nothing() -> None:
    app = Proxy([START])
    assert await call(app, pieces=[]) == []
    assert app.bodies == []


async def test_no_ingress_hears_of_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "BODY_S", 0.05)
    sent: list[Message] = []
    pieces = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Message:
        for piece in pieces:
            return piece
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    app = Proxy()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await LostIngress(app)(scope, receive, send)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"]) == json.loads(
        describe(BodyTooSlow(f"the body has not come within {60:g} s")).body()
    )
    assert app.bodies == []


async def test_bodies_of_all_lengths_pass_a_real_server() -> None:
    server = uvicorn.Server(uvicorn.Config(LostIngress(echo), port=0, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/completions"
    async with httpx.AsyncClient() as http:
        for size in (0, 1, 100_000, MAX_KEPT_BYTES, MAX_KEPT_BYTES + 1, 3_000_000):
            assert (await http.post(url, content=b"x" * size)).text == str(size)
        assert (await http.get(url)).text == "0"
    server.should_exit = True
    await serving


async def test_other_protocols_pass() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        await asyncio.sleep(0)

    await LostIngress(app)({"type": "websocket"}, nothing, nothing)
    assert seen == ["websocket"]


def test_a_proxy_starts_without_torch() -> None:
    code = "import sys; from lorafleet.cluster.http import proxy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
