"""The admin routes and those of vLLM and SGLang, over HTTP, on a fleet and a store of dicts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from lorafleet.adapter_store.errors import InvalidKey, UnknownKey
from lorafleet.adapter_store.source_config import DirectoryConfig, HubConfig, SourceConfig
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.admin.routes import build_router
from lorafleet.cluster.errors import StoreUnavailable
from lorafleet.cluster.http.app import build_http_app
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.store.paths import locate
from lorafleet.cluster.wire import StoreProblem
from tests.cluster.fleets import DictFleet, DictStore, manifest_of

ADMIN = {"authorization": "Bearer admin"}


@dataclass(slots=True)
class Api:
    http: httpx.AsyncClient
    store: DictStore
    fleet: DictFleet
    root: Path

    async def load(self, name: str = "shout", key: str = "a", **body: object) -> httpx.Response:
        return await self.http.put(f"/admin/v1/adapters/{name}", json={"source": "demo", "key": key, **body})


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    for key in "ab":
        (tmp_path / "adapters" / key).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    sources: list[SourceConfig] = [DirectoryConfig(name="demo", root=tmp_path / "adapters")]
    store = DictStore(keys={"a": manifest_of("a"), "b": manifest_of("b")}, sources=sources)
    fleet = DictFleet(store, ["w0", "w1"])
    app = build_http_app([build_router(Rollout(store, fleet), Keys(("client",), "admin"))])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=ADMIN) as http:
        yield Api(http, store, fleet, tmp_path)


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


ROUTES = [
    ("GET", "/admin/v1/adapters"),
    ("GET", "/admin/v1/adapters/x"),
    ("PUT", "/admin/v1/adapters/x"),
    ("DELETE", "/admin/v1/adapters/x"),
    ("POST", "/admin/v1/adapters/x/pin"),
    ("POST", "/admin/v1/adapters/x/unpin"),
    ("POST", "/admin/v1/adapters:validate"),
    ("GET", "/admin/v1/workers"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/unload_lora_adapter"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_needs_the_admin_token(api: Api, method: str, path: str) -> None:
    assert error_of(await api.http.request(method, path, headers={"authorization": ""})) == (401, "invalid_api_key")
    client = {"authorization": "Bearer client"}
    assert error_of(await api.http.request(method, path, headers=client)) == (403, "forbidden")


async def test_put_get_list_and_delete(api: Api) -> None:
    response = await api.load(warm="all")
    assert response.status_code == 200
    manifest = api.store.keys["a"]
    expected = {
        "name": "shout",
        "version": manifest.version,
        "source": "demo",
        "key": "a",
        "rank": 4,
        "targets": ["q_proj"],
        "bytes": 400,
        "warnings": [],
        "chat": None,
        "pages": 4,
        "pinned": False,
        "state": "resident",
        "workers": {"w0": "resident", "w1": "resident"},
    }
    assert response.json() == expected
    assert (await api.http.get("/admin/v1/adapters/shout")).json() == expected
    assert (await api.http.get("/admin/v1/adapters")).json() == {"adapters": [expected], "problems": []}
    assert (await api.http.delete("/admin/v1/adapters/shout")).json() == {"name": "shout", "deleted": True}
    assert error_of(await api.http.delete("/admin/v1/adapters/shout")) == (404, "adapter_not_found")
    assert error_of(await api.http.get("/admin/v1/adapters/shout")) == (404, "adapter_not_found")


async def test_warm_0_stores_without_loading(api: Api) -> None:
    reply = (await api.load(warm=0)).json()
    assert (reply["state"], reply["pages"], reply["workers"]) == ("stored", 4, {"w0": "absent", "w1": "absent"})


async def test_pin_and_unpin(api: Api) -> None:
    await api.load()
    assert (await api.http.post("/admin/v1/adapters/shout/pin")).json()["pinned"] is True
    assert (await api.http.post("/admin/v1/adapters/shout/unpin")).json()["pinned"] is False
    assert error_of(await api.http.post("/admin/v1/adapters/nobody/pin")) == (404, "adapter_not_found")


async def test_no_room_is_a_409_and_nothing_changes(api: Api) -> None:
    api.fleet.workers["w1"].total = 3
    response = await api.load(pinned=True)
    assert error_of(response) == (409, "no_room")
    assert "worker w1" in response.json()["error"]["message"]
    assert api.store.names == {}


async def test_the_store_away_is_a_503_with_retry_after(api: Api) -> None:
    api.store.fail_flip = StoreUnavailable("away", None, 2.0)
    response = await api.load()
    assert error_of(response) == (503, "store_unavailable")
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"source": "demo"},
        {"source": "demo", "key": "a", "warm": -1},
        {"source": "demo", "key": "a", "warm": "some"},
        {"source": "demo", "key": "a", "nonsense": 1},
        {"source": 3, "key": "a"},
        [],
        None,
    ],
)
async def test_bad_bodies_are_refused(api: Api, body: object) -> None:
    response = await api.http.put("/admin/v1/adapters/shout", json=body)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert api.store.num_published == 0


async def test_malformed_json_is_refused(api: Api) -> None:
    response = await api.http.put(
        "/admin/v1/adapters/shout", content=b"{", headers={"content-type": "application/json"}
    )
    assert error_of(response) == (400, "invalid_json")


async def test_validate_is_a_dry_run(api: Api) -> None:
    response = await api.http.post("/admin/v1/adapters:validate", json={"source": "demo", "key": "a"})
    reply = response.json()
    assert reply["fits"] is True
    assert reply["pages"] == 4
    assert reply["workers"]["w0"] == {"fits": True, "pages": 4, "evicts": [], "refusal": None}
    assert api.store.names == {}
    missing = await api.http.post("/admin/v1/adapters:validate", json={"source": "demo", "key": "z"})
    assert error_of(missing) == (404, "key_not_found")


async def test_workers_have_the_contracts_fields(api: Api) -> None:
    await api.load(warm="all")
    workers = (await api.http.get("/admin/v1/workers")).json()["workers"]
    assert [worker["worker_id"] for worker in workers] == ["w0", "w1"]
    assert {"pid", "node_id", "device", "running", "waiting", "leases"} <= workers[0].keys()
    assert workers[0]["kv_pages"].keys() == {"used", "cached", "total"}
    assert workers[0]["adapter_pages"] == {"used": 4, "total": 100}
    held = workers[0]["adapters"][0]
    assert held["name"] == "shout"
    assert {"version", "rank", "pages", "pinned", "leases"} <= held.keys()


async def test_vllm_load_and_unload(api: Api) -> None:
    path = str(api.root / "adapters" / "a")
    body = {"lora_name": "shout", "lora_path": path}
    response = await api.http.post("/v1/load_lora_adapter", json=body)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'shout' added successfully.")
    again = await api.http.post("/v1/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    inplace = {"lora_name": "shout", "lora_path": "b", "load_inplace": True}
    assert (await api.http.post("/v1/load_lora_adapter", json=inplace)).status_code == 200
    assert api.store.names["shout"].key == "b"
    response = await api.http.post("/v1/unload_lora_adapter", json={"lora_name": "shout"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'shout' removed successfully.")
    response = await api.http.post("/v1/unload_lora_adapter", json={"lora_name": "shout"})
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "The lora adapter 'shout' cannot be found.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"lora_name": "x"}, 400),
        ({"lora_name": "x", "lora_path": "../outside"}, 400),
        ({"lora_name": "x", "lora_path": "/etc"}, 400),
        ({"lora_name": "x", "lora_path": "nowhere"}, 404),
    ],
)
async def test_vllm_refusals(api: Api, body: dict[str, str], status: int) -> None:
    response = await api.http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == status
    assert response.json()["error"]["code"] == status
    assert api.store.num_published == 0


async def test_sglang_load_and_unload(api: Api) -> None:
    for field in ("lora_name", "lora_path"):
        lacking = await api.http.post("/load_lora_adapter", json={"lora_name": "x", "lora_path": "a", field: ""})
        assert (lacking.status_code, field in lacking.json()["error_message"]) == (400, True)
    body = {"lora_name": "shout", "lora_path": str(api.root / "adapters" / "a"), "pinned": True}
    response = await api.http.post("/load_lora_adapter", json=body)
    loaded = {"shout": "demo/a"}
    assert response.status_code == 200
    assert response.json() == {"success": True, "error_message": None, "loaded_adapters": loaded}
    assert api.store.names["shout"].pinned
    again = await api.http.post("/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert again.json()["success"] is False
    assert again.json()["loaded_adapters"] == loaded
    outside = await api.http.post("/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc"})
    assert outside.status_code == 400
    response = await api.http.post("/unload_lora_adapter", json={"lora_name": "shout"})
    assert response.json() == {"success": True, "error_message": None, "loaded_adapters": {}}
    assert (await api.http.post("/unload_lora_adapter", json={"lora_name": "shout"})).status_code == 400


@pytest.mark.parametrize("yes", [True, "true", 1, "1", "on"], ids=repr)
async def test_switches_are_as_lax_as_the_peers(api: Api, yes: object) -> None:
    body = {"lora_name": "shout", "lora_path": "a"}
    assert (await api.http.post("/load_lora_adapter", json={**body, "pinned": yes})).status_code == 200
    assert api.store.names["shout"].pinned
    for no in (False, "false", 0, None):
        taken = await api.http.post("/v1/load_lora_adapter", json={**body, "load_inplace": no, "lora_int_id": 7})
        assert taken.status_code == 400
    replaced = await api.http.post("/v1/load_lora_adapter", json={**body, "lora_path": "b", "load_inplace": yes})
    assert (replaced.status_code, api.store.names["shout"].key) == (200, "b")
    others: tuple[object, ...] = ("maybe", 2, [], {})
    for wrong in others:
        refused = await api.http.post("/v1/load_lora_adapter", json={**body, "load_inplace": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "load_inplace")


def test_paths_are_confined_to_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "adapters"
    (root / "team" / "shout").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "inner").symlink_to(root / "team")
    sources: list[SourceConfig] = [DirectoryConfig(name="demo", root=root), HubConfig(name="hub")]
    monkeypatch.chdir(tmp_path)
    assert locate(str(root / "team" / "shout"), sources) == ("demo", "team/shout")
    assert locate("adapters/team/shout", sources) == ("demo", "team/shout")
    assert locate("team/shout", sources) == ("demo", "team/shout")
    assert locate(str(root / "inner" / "shout"), sources) == ("demo", "team/shout")
    assert locate("org/adapter", sources) == ("hub", "org/adapter")
    for path in (
        "",
        "/",
        str(root),
        str(root / "link"),
        str(root / ".." / "outside"),
        "../adapters/../outside",
        "~root",
    ):
        with pytest.raises(InvalidKey):
            locate(path, sources)
    with pytest.raises(UnknownKey):
        locate("nowhere", sources)
    for path in ("a\0b", "~nobody-of-this-name/a", "a" * 300, "\ud800"):
        with pytest.raises(InvalidKey) as refused:
            locate(path, sources)
        assert refused.value.code == "invalid_key"


NAMES = (
    "org/adapter",
    "org/adapter@v2",
    "policy@12",
    "/srv/runs/step_1",
    "/srv/.cache/hub/models--org--x",
    "a/pin",
)


async def test_a_name_with_a_newline_is_not_the_name_without_it(api: Api) -> None:
    await api.load("shout", "a")
    assert error_of(await api.http.delete("/admin/v1/adapters/shout%0A")) == (404, "unknown_url")
    body = {"source": "demo", "key": "b"}
    assert error_of(await api.http.put("/admin/v1/adapters/shout%0A", json=body)) == (404, "unknown_url")
    assert api.store.names["shout"].key == "a"


@pytest.mark.parametrize("name", NAMES)
async def test_names_as_people_have_them(api: Api, name: str) -> None:
    response = await api.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "a"})
    assert response.status_code == 200, response.text
    url = f"/admin/v1/adapters/{name}"
    assert (await api.http.get(url)).json()["name"] == name
    assert (await api.http.post(f"{url}/pin")).json()["pinned"] is True
    assert (await api.http.post(f"{url}/unpin")).json()["pinned"] is False
    assert (await api.load(name, "b")).json()["key"] == "b"
    assert (await api.http.delete(url)).json() == {"name": name, "deleted": True}
    assert error_of(await api.http.get(url)) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    "name", ["schön", "a b", "../up", "a/../b", "a//b", "a/", "base:a", "a" * 130, "a/" * 16 + "a"]
)
async def test_other_names_are_refused_clearly(api: Api, name: str) -> None:
    response = await api.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "a"})
    assert response.status_code == 400
    assert "A-Z, a-z, 0-9" in response.json()["error"]["message"]
    assert not api.store.names


async def test_a_revision_is_for_hub_sources(api: Api) -> None:
    assert error_of(await api.load(revision="v2")) == (400, "invalid_value")


@pytest.mark.parametrize(
    "routes",
    [("/v1/load_lora_adapter",) * 2, ("/load_lora_adapter",) * 2, ("/v1/load_lora_adapter", "/load_lora_adapter")],
)
async def test_of_two_loads_at_the_same_time_one_wins(api: Api, routes: tuple[str, str]) -> None:
    api.store.may_publish = asyncio.Event()
    loads = [
        asyncio.create_task(api.http.post(route, json={"lora_name": "shout", "lora_path": key}))
        for route, key in zip(routes, "ab", strict=True)
    ]
    await asyncio.sleep(0.05)
    api.store.may_publish.set()
    replies = await asyncio.gather(*loads)
    assert sorted(reply.status_code for reply in replies) == [200, 400]
    winner = next(i for i, reply in enumerate(replies) if reply.status_code == 200)
    assert api.store.names["shout"].key == "ab"[winner]
    assert "already" in replies[1 - winner].text
    assert api.store.num_published == 1


async def test_adapters_are_listed_in_pages_with_what_is_wrong_with_the_store(api: Api) -> None:
    for name in ("b", "a", "d", "c"):
        (await api.load(name)).raise_for_status()
    api.store.found = (StoreProblem("store_damaged", "version", "aa", "its files are gone: load it again"),)
    seen: list[str] = []
    while True:
        reply = (await api.http.get("/admin/v1/adapters", params={"limit": 3, "after": (seen or [""])[-1]})).json()
        assert reply["problems"] == [
            {"code": "store_damaged", "kind": "version", "entry": "aa", "reason": "its files are gone: load it again"}
        ]
        if not reply["adapters"]:
            break
        seen += [adapter["name"] for adapter in reply["adapters"]]
    assert seen == ["a", "b", "c", "d"]
    api.store.found = (StoreProblem("user_config_refused", "user_config", "", "adapters: no list"),)
    (problem,) = (await api.http.get("/admin/v1/adapters")).raise_for_status().json()["problems"]
    assert (problem["code"], problem["entry"], problem["reason"]) == ("user_config_refused", "", "adapters: no list")
    for limit in ("0", "-1", "x"):
        refused = await api.http.get("/admin/v1/adapters", params={"limit": limit})
        assert error_of(refused) == (400, "invalid_value")
