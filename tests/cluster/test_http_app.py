"""The HTTP application around the routes: errors that nobody expected, and its own description."""

from __future__ import annotations

from typing import Annotated, Literal

import httpx
import pytest
from fastapi import APIRouter, Body, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from lorafleet.cluster.http.app import build_http_app
from tests.cluster.serving import Service


class Typed(BaseModel):
    """A body that FastAPI parses."""

    count: int
    warm: Literal["all"] | Annotated[int, Field(ge=0)] = 1


def app_with_faults() -> httpx.ASGITransport:
    router = APIRouter()

    @router.get("/bug")
    async def bug() -> None:
        raise KeyError("/secret/path")

    @router.get("/teapot")
    async def teapot() -> None:
        raise HTTPException(418, "short and stout", {"x-kind": "pot"})

    @router.get("/half")
    async def half() -> StreamingResponse:
        async def events() -> object:
            yield b"half"
            raise KeyError("bug")

        return StreamingResponse(events())  # type: ignore[arg-type]

    @router.put("/typed")
    async def typed(body: Typed = Body()) -> int:  # noqa: B008
        return body.count

    return httpx.ASGITransport(build_http_app([router]), raise_app_exceptions=True)


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code", "param"),
    [
        ("GET", "/bug", "", 500, "internal_error", None),
        ("GET", "/teapot", "", 418, "bad_request", None),
        ("PUT", "/typed", "{", 400, "invalid_json", None),
        ("PUT", "/typed", b'{"count": "\xff"}', 400, "invalid_json", None),
        ("PUT", "/typed", '{"count":' * 5000 + "1" + "}" * 5000, 400, "invalid_json", None),
        ("PUT", "/typed%0A", "{}", 404, "unknown_url", None),
        ("PUT", "/typed", '{"count": "many"}', 400, "invalid_value", "count"),
        ("PUT", "/typed", "{}", 400, "missing_parameter", "count"),
        ("PUT", "/typed", "null", 400, "invalid_json", None),
        ("PUT", "/typed", "[]", 400, "invalid_json", None),
        ("PUT", "/typed", '{"count": 1, "warm": -1}', 400, "invalid_value", "warm"),
        ("GET", "/typed", "", 405, "method_not_allowed", None),
        ("GET", "/typed/", "", 404, "unknown_url", None),
        ("GET", "/nowhere", "", 404, "unknown_url", None),
    ],
)
async def test_errors(method: str, path: str, content: str | bytes, status: int, code: str, param: str | None) -> None:
    async with httpx.AsyncClient(transport=app_with_faults(), base_url="http://x") as client:
        response = await client.request(method, path, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert "secret" not in response.text


async def test_what_is_wrong_is_said_in_one_sentence() -> None:
    async with httpx.AsyncClient(transport=app_with_faults(), base_url="http://x") as client:
        union = await client.put("/typed", json={"count": 1, "warm": "some"})
        form = await client.put("/typed", content='{"count": 1}', headers={"content-type": "text/plain"})
    assert union.json()["error"]["message"].startswith("warm must be 'all' or a whole number; got")
    assert union.json()["error"]["message"].endswith('got "some"')
    assert "content-type: application/json" in form.json()["error"]["message"]


async def test_headers_of_errors_are_kept() -> None:
    async with httpx.AsyncClient(transport=app_with_faults(), base_url="http://x") as client:
        assert (await client.get("/teapot")).headers["x-kind"] == "pot"
        assert (await client.get("/typed")).headers["allow"] == "PUT"


async def test_a_bug_in_the_middle_of_a_reply_cuts_it() -> None:
    async with httpx.AsyncClient(transport=app_with_faults(), base_url="http://x") as client:
        with pytest.raises(KeyError):
            await client.get("/half")


async def test_the_api_describes_itself() -> None:
    transport = httpx.ASGITransport(Service().app())
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "messages"]
    assert "num_prompt_tops" not in body["properties"]
    assert "$ref" not in str(body)
    assert set(paths) == {
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/responses",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/chat/completions",
        "/detokenize",
        "/health",
        "/healthz",
        "/metrics",
        "/ping",
        "/readyz",
        "/tokenize",
        "/tokenizer_info",
        "/version",
    }
