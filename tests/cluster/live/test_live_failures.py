"""Dead workers, a dead store, too many requests: what is lost, what is not, and that all comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray

from lorafleet.cluster.worker.spare_keeper import READY
from tests.cluster.live.service import LiveService, served_by, spares, version_of
from tests.support.wait import eventually

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("tidy")]


def texts(events: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in events for choice in event.get("choices", ()))


def test_a_killed_worker_costs_only_its_begun_streams(live: LiveService) -> None:
    """And the one that takes its place never serves what was replaced meanwhile."""
    old = live.put("pinned", "one", pinned=True).raise_for_status().json()["version"]
    expected = texts(live.stream("pinned", max_tokens=96))
    victim, survivor = sorted(live.worker_ids())
    with ThreadPoolExecutor(48) as pool:
        streams = [pool.submit(live.stream, "pinned", max_tokens=96) for _ in range(24)]
        eventually(lambda: all(worker["running"] >= 4 for worker in live.workers()))
        live.kill("worker", worker_id=victim)
        killed_s = time.monotonic()
        late = [pool.submit(live.complete, "pinned") for _ in range(16)]
        ended = [stream.result() for stream in streams]
        responses = [response.result() for response in late]
    assert served_by(responses) == {survivor}
    whole = [events for events in ended if "error" not in events[-1]]
    broken = [events for events in ended if "error" in events[-1]]
    assert all(texts(events) == expected for events in whole)
    assert broken
    for events in broken:
        assert sum("error" in event for event in events) == 1
        assert events[-1]["error"]["code"] == "stream_broken"
        assert expected.startswith(texts(events))
        assert texts(events)
    new = live.put("pinned", "two", pinned=True).raise_for_status().json()["version"]
    seen = set()
    while len(live.worker_ids()) < 2:
        seen |= {version_of(response) for response in live.complete_many("pinned", 4, max_tokens=2)}
        assert time.monotonic() - killed_s < 30.0
    responses = live.complete_many("pinned", 48, max_tokens=16)
    seen |= {version_of(response) for response in responses}
    assert served_by(responses) == live.worker_ids()
    assert victim not in live.worker_ids()
    assert seen == {new}
    assert new != old
    eventually(lambda: set(live.adapter("pinned")["workers"].values()) == {"resident"}, 5.0)


def test_a_process_in_reserve_takes_a_dead_workers_place(live: LiveService) -> None:
    eventually(lambda: bool(spares(READY)), 120.0)
    [spare] = spares(READY)
    victim = min(live.worker_ids())
    live.kill("worker", worker_id=victim)
    eventually(lambda: victim not in live.worker_ids() and len(live.worker_ids()) == 2, 60.0)
    assert spare in {worker["pid"] for worker in live.workers()}
    assert served_by(live.complete_many("tiny", 48, max_tokens=16)) == live.worker_ids()
    eventually(lambda: bool(spares(READY) - {spare}), 120.0)


def test_a_killed_store_is_missed_by_cold_adapters_only(live: LiveService) -> None:
    live.put("hot", "one", warm="all").raise_for_status()
    live.put("lone", "thick", warm=1).raise_for_status()
    live.put("cold", "two", warm=0).raise_for_status()
    [holder] = [worker for worker, state in live.adapter("lone")["workers"].items() if state == "resident"]
    before = live.http.get("/admin/v1/adapters").json()
    live.kill("adapter_store")
    began_s = time.monotonic()
    seen_cold: list[httpx.Response] = []
    while not seen_cold or seen_cold[-1].status_code == 503:
        assert live.complete("hot").status_code == 200
        assert live.complete("tiny").status_code == 200
        # So many at once that some would go elsewhere, were somebody there to fetch it.
        lone = live.complete_many("lone", 20)
        assert {response.status_code for response in lone} == {200}
        seen_cold.append(live.complete("cold"))
        # Away before and after them: it was away in between.
        if [response.status_code for response in seen_cold[-2:]] == [503, 503]:
            assert served_by(lone) == {holder}
        assert time.monotonic() - began_s < 60
    away = seen_cold[:-1]
    assert away, "the store came back before anyone could miss it"
    assert all(int(response.headers["retry-after"]) >= 1 for response in away)
    assert seen_cold[-1].status_code == 200
    eventually(lambda: live.http.get("/admin/v1/adapters").status_code == 200)
    after = live.http.get("/admin/v1/adapters").json()
    for adapters in (before, after):
        for adapter in adapters["adapters"]:
            for volatile in ("workers", "state", "pages"):
                del adapter[volatile]
    assert after == before
    assert live.put("hot", "two").status_code == 200


def test_a_stopped_worker_is_ended_and_replaced(live: LiveService) -> None:
    """Its streams end within seconds, with an error event or whole; listings do not wait for it."""
    victim = next(worker for worker in live.workers() if worker["worker_id"])
    with ThreadPoolExecutor(24) as pool:
        streams = [pool.submit(live.stream, "tiny", max_tokens=400) for _ in range(24)]
        eventually(lambda: all(worker["running"] >= 4 for worker in live.workers()))
        os.kill(victim["pid"], signal.SIGSTOP)
        began_s = time.monotonic()
        response = live.http.get("/admin/v1/adapters")
        assert response.status_code == 200
        assert time.monotonic() - began_s < 8
        ended = [stream.result() for stream in streams]
    assert time.monotonic() - began_s < 60
    for events in ended:
        assert sum("error" in event for event in events) == ("error" in events[-1])
    eventually(lambda: len(live.worker_ids()) == 2 and victim["worker_id"] not in live.worker_ids(), 60.0)


def test_too_many_requests_are_refused_at_once_and_the_admitted_finish(live: LiveService) -> None:
    """Two workers take twice 16 each, and 16 more may wait."""
    refused_s: list[float] = []
    statuses: list[int] = []
    lock = threading.Lock()

    def ask() -> None:
        began_s = time.monotonic()
        response = live.complete("tiny", max_tokens=48)
        with lock:
            statuses.append(response.status_code)
            if response.status_code == 429:
                refused_s.append(time.monotonic() - began_s)
                assert response.json()["error"]["code"] == "overloaded"
                assert int(response.headers["retry-after"]) >= 1

    threads = [threading.Thread(target=ask) for _ in range(160)]
    for thread in threads:
        thread.start()
    assert live.http.get("/admin/v1/workers").status_code == 200
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 80
    eventually(lambda: all(worker["running"] + worker["waiting"] == 0 for worker in live.workers()), 5.0)
    assert live.complete("tiny").status_code == 200


def test_everything_is_measured(live: LiveService) -> None:
    live.put("hot", "one").raise_for_status()
    live.complete("hot").raise_for_status()
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        "requests",
        "prompt_tokens",
        "generation_tokens",
        "time_to_first_token_seconds",
        "request_stage_seconds",
        "request_routing_seconds",
        "time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_queued",
        "batch_sequences",
        "kv_pages",
        "adapter_pages",
        "adapters",
        "adapter_loads",
        "adapter_load_seconds",
        "step_seconds",
    }

    def missing() -> set[str]:
        lines = httpx.get(url).text.splitlines()
        exported = [line for line in lines if line.startswith("ray_lorafleet_")]
        return {name for name in wanted if not any(line.startswith(f"ray_lorafleet_{name}") for line in exported)}

    eventually(lambda: not missing(), 30.0)
    lines = [line for line in httpx.get(url).text.splitlines() if line.startswith("ray_lorafleet_requests")]
    assert any('adapter="hot"' in line for line in lines)
