"""Roll-outs and routing over real workers: what is replaced is replaced everywhere, and what is hot is spread."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest
from ray import serve

from lorafleet.cluster.errors import WorkerGone
from lorafleet.cluster.ray_internals import http_hosts
from lorafleet.cluster.worker.client import WorkersClient
from tests.cluster.live.service import APP, LiveService, served_by, version_of
from tests.support.wait import eventually

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("tidy")]


def pages_used(live: LiveService) -> int:
    return sum(worker["adapter_pages"]["used"] for worker in live.workers())


def test_ready_means_preloaded(live: LiveService) -> None:
    assert live.adapter("preloaded")["state"] == "resident"
    assert live.http.get("/healthz").status_code == 200
    assert len(live.workers()) == 2
    assert http_hosts() == ("127.0.0.1",)


def test_put_answers_with_what_is_there(live: LiveService) -> None:
    reply = live.put("shout", "one", warm="all").raise_for_status().json()
    assert reply["rank"] == 16
    assert set(reply["workers"]) == live.worker_ids()
    assert set(reply["workers"].values()) == {"resident"}
    assert version_of(live.complete("shout")) == reply["version"]
    assert live.complete("shout").json()["choices"] != live.complete("tiny").json()["choices"]


def test_an_adapter_stays_on_its_worker_until_it_is_hot(live: LiveService) -> None:
    live.put("shout", "two", warm=1)
    (holder,) = [w for w, state in live.adapter("shout")["workers"].items() if state == "resident"]
    assert served_by([live.complete("shout") for _ in range(12)]) == {holder}
    assert served_by(live.complete_many("shout", 40, max_tokens=24)) == live.worker_ids()


def test_requests_after_a_replacement_see_only_the_new_version(live: LiveService) -> None:
    """Streams that began before keep the old one; its pages are free soon after the last of them."""
    old = live.put("shout", "one", warm="all").json()["version"]
    before = pages_used(live)
    expected = live.complete("shout", max_tokens=64).json()["choices"]
    stop = threading.Event()
    seen_after: list[str] = []
    streams: list[httpx.Response] = []

    def stream() -> None:
        streams.append(live.complete("shout", max_tokens=64))

    def ask_on() -> None:
        while not stop.is_set():
            replaced_before = replaced.is_set()
            response = live.complete("shout", max_tokens=2)
            if replaced_before:
                seen_after.append(version_of(response))

    replaced = threading.Event()
    threads = [threading.Thread(target=stream) for _ in range(20)] + [threading.Thread(target=ask_on) for _ in range(6)]
    for thread in threads:
        thread.start()
    eventually(lambda: sum(worker["running"] for worker in live.workers()) >= 10)
    new = live.put("shout", "two").raise_for_status().json()["version"]
    replaced.set()
    for thread in threads[:20]:
        thread.join()
    ended_s = time.monotonic()
    eventually(lambda: pages_used(live) == before, 2.0)
    assert time.monotonic() - ended_s < 2.0
    eventually(lambda: len(seen_after) > 10)
    stop.set()
    for thread in threads[20:]:
        thread.join()
    assert new != old
    assert set(seen_after) == {new}
    assert {version_of(response) for response in streams} == {old}
    assert all(response.json()["choices"] == expected for response in streams)


def test_one_worker_without_room_stops_a_rollout_and_is_named(live: LiveService) -> None:
    """Half the pool of one worker is held, so what is pinned everywhere does not fit there."""
    live.put("shout", "one", warm="all")
    victim = sorted(live.worker_ids())[0]
    thick = live.put("thick", "thick", warm=0).json()["version"]
    fleet = WorkersClient(serve.get_deployment_handle("worker", APP))

    async def hold() -> None:
        async with asyncio.timeout(20):
            while victim not in await fleet.worker_ids():
                await asyncio.sleep(0.1)
        await fleet.make_resident(victim, thick, hold_s=60, pinned=False)

    asyncio.run(hold())
    old = live.adapter("shout")["version"]
    try:
        refused = live.put("shout", "two", pinned=True)
    finally:
        asyncio.run(fleet.release_hold(victim, thick))
    assert refused.status_code == 409, refused.text
    error = refused.json()["error"]
    assert error["code"] == "no_room"
    assert f"worker {victim} has no room for 'shout'" in error["message"]
    assert live.adapter("shout")["version"] == old
    assert all(not held["pinned"] for worker in live.workers() for held in worker["adapters"])


def test_calls_to_a_worker_reach_it_or_fail(live: LiveService) -> None:
    fleet = WorkersClient(serve.get_deployment_handle("worker", APP))

    async def ask() -> None:
        async with asyncio.timeout(20):
            while len(await fleet.worker_ids()) < 2:
                await asyncio.sleep(0.1)
        for worker_id in await fleet.worker_ids():
            assert (await fleet.state(worker_id)).worker_id == worker_id
        with pytest.raises(WorkerGone, match="nobody"):
            await fleet.state("nobody")

    asyncio.run(ask())


def test_user_config_applies_without_a_restart(live: LiveService) -> None:
    pids = {worker["pid"] for worker in live.workers()}
    live.put("mine", "thin")
    adapters = [{"name": "wished", "source": "demo", "key": "one"}, {"name": "other", "source": "demo", "key": "two"}]
    live.deploy({"adapters": adapters})
    eventually(lambda: live.complete("other").status_code == 200)
    assert live.adapter("wished")["key"] == "one"
    live.deploy({"adapters": [{"name": "wished", "source": "demo", "key": "two", "pinned": True}]})
    eventually(lambda: live.complete("other").status_code == 404)
    eventually(lambda: live.adapter("wished")["key"] == "two")
    assert set(live.adapter("wished")["workers"].values()) == {"resident"}
    assert live.complete("mine").status_code == 200
    live.deploy({"adapters": []})
    eventually(lambda: live.complete("wished").status_code == 404)
    assert live.complete("mine").status_code == 200
    assert live.complete("preloaded").status_code == 200
    assert {worker["pid"] for worker in live.workers()} == pids
