"""A browser's preflight, and the headers without which its pages read no reply."""

from __future__ import annotations

import httpx
import pytest
from pydantic import ValidationError

from lorafleet.cluster.config import HttpConfig
from lorafleet.cluster.http.app import build_http_app
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.openai.routes import build_router
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.serving.names import Names
from tests.cluster.fakes import FakeStore, FakeWorkers, make_prompts
from tests.cluster.serving import BASE_ID

ORIGIN = "http://localhost:3000"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-timeout",
}
BODY = {"model": BASE_ID, "prompt": "Hello", "max_tokens": 2}


def client_of(*origins: str) -> httpx.AsyncClient:
    prompts = make_prompts()
    dispatcher = Dispatcher(BASE_ID, prompts, Names(FakeStore()), FakeWorkers(prompts), RequestMetrics())
    app = build_http_app([build_router(dispatcher, Keys(("secret",)), started=0)], origins)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


@pytest.mark.parametrize("origins", [(ORIGIN,), ("https://other.example", ORIGIN), ("*",)])
async def test_allowed_origins(origins: tuple[str, ...]) -> None:
    allowed = "*" if "*" in origins else ORIGIN
    key = {"origin": ORIGIN, "authorization": "Bearer secret"}
    async with client_of(*origins) as http:
        preflight = await http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert "x-stainless-timeout" in preflight.headers["access-control-allow-headers"]
        assert "POST" in preflight.headers["access-control-allow-methods"]
        replies = [
            preflight,
            await http.post("/v1/completions", json=BODY, headers=key),
            await http.post("/v1/completions", json=BODY | {"stream": True}, headers=key),
            await http.post("/v1/completions", json=BODY | {"temperature": 9}, headers=key),
            await http.post("/v1/completions", json=BODY, headers={"origin": ORIGIN}),
            await http.get("/nowhere", headers=key),
            await http.get("/v1/completions", headers=key),
            await http.post("/v1/completions", content=b"[" * 2**26, headers=key),
            await http.post("/v1/completions", content=b"{", headers=key),
            await http.post("/v1/completions", json=BODY | {"model": "nobody", "stream": True}, headers=key),
        ]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 400, 401, 404, 405, 413, 400, 404]
    for reply in replies:
        assert reply.headers.get_list("access-control-allow-origin") == [allowed]
        assert len(reply.headers.get_list("x-request-id")) == 1
        assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize("origins", [(), ("https://other.example",)])
async def test_others_get_no_headers(origins: tuple[str, ...]) -> None:
    async with client_of(*origins) as http:
        preflight = await http.options("/v1/completions", headers=PREFLIGHT)
        assert preflight.status_code >= 400
        reply = await http.post("/v1/completions", json=BODY, headers={"origin": ORIGIN})
    for each in (preflight, reply):
        assert "access-control-allow-origin" not in each.headers


def test_origins_are_checked() -> None:
    assert HttpConfig(cors_origins=("*", "https://a.example:8443", ORIGIN)).cors_origins[0] == "*"
    for wrong in ("a.example", "https://a.example/path", ""):
        with pytest.raises(ValidationError):
            HttpConfig(cors_origins=(wrong,))
