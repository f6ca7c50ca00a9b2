"""A page in a browser on the same machine, against a service that needs no secret."""

from __future__ import annotations

import httpx
import pytest
from fastapi import APIRouter

from lorafleet.cluster.http.app import build_http_app

HOST = "127.0.0.1:8000"
HOME = f"http://{HOST}"


def client_of(*origins: str, is_open: bool = True) -> httpx.AsyncClient:
    """Routes of the data plane and of the admin plane that answer `done`."""
    router = APIRouter()

    async def done() -> str:
        return "done"

    for path in ("/v1/completions", "/admin/v1/adapters/a", "/v1/load_lora_adapter", "/healthz"):
        router.add_api_route(path, done, methods=["GET", "POST", "PUT"])
    app = build_http_app([router], origins, is_open=is_open)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOME)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8000", ""]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/admin/v1/adapters/a", "/v1/load_lora_adapter"])
async def test_a_page_of_another_origin_is_refused(path: str, origin: str) -> None:
    async with client_of("http://app.example") as http:
        reply = await http.put(path, headers={"origin": origin})
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "10.0.0.1:8000", "127.0.0.1.evil.example", "["])
async def test_a_name_that_was_made_to_point_here_is_refused(host: str) -> None:
    async with client_of() as http:
        for path in ("/v1/completions", "/admin/v1/adapters/a", "/healthz"):
            assert (await http.get(path, headers={"host": host})).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "127.1.2.3"])
async def test_programs_and_the_services_own_pages_pass(host: str) -> None:
    async with client_of() as http:
        assert (await http.put("/admin/v1/adapters/a", headers={"host": host})).status_code == 200
        own = {"host": host, "origin": f"http://{host}"}
        assert (await http.put("/admin/v1/adapters/a", headers=own)).status_code == 200


async def test_an_origin_that_is_named_passes_and_a_star_opens_the_data_plane_only() -> None:
    page = {"origin": "http://app.example"}
    async with client_of("http://app.example") as http:
        assert (await http.put("/admin/v1/adapters/a", headers=page)).status_code == 200
    async with client_of("*") as http:
        assert (await http.post("/v1/completions", headers=page)).status_code == 200
        assert (await http.put("/admin/v1/adapters/a", headers=page)).status_code == 403
        assert (await http.post("/v1/load_lora_adapter", headers=page)).status_code == 403


async def test_where_a_secret_is_needed_it_decides() -> None:
    async with client_of(is_open=False) as http:
        headers = {"origin": "http://evil.example", "host": "service.example"}
        assert (await http.put("/admin/v1/adapters/a", headers=headers)).status_code == 200
