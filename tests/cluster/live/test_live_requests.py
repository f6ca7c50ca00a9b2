"""Requests through the whole service: the handle, clients that vanish, and more adapters than fit."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from lorafleet.workers.request import GenerateRequest
from tests.cluster.live.service import APP, BASE_ID, LiveService
from tests.support.wait import eventually

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("tidy")]


def is_idle(live: LiveService) -> bool:
    """No request, no lease and no KV page of a live request on any worker."""
    return all(
        worker["running"] + worker["waiting"] + worker["leases"] + worker["kv_pages"]["used"] == 0
        for worker in live.workers()
    )


def test_the_python_handle_gives_what_http_gives(live: LiveService) -> None:
    live.put("shout", "one").raise_for_status()
    by_http = live.complete("shout", max_tokens=24, n=2, return_token_ids=True).json()["choices"]
    handle = serve.get_app_handle(APP).options(stream=True)
    request = GenerateRequest(model="shout", prompt="Hello", max_tokens=24, n=2, temperature=0, ignore_eos=True)
    by_handle: dict[int, list[int]] = {0: [], 1: []}
    for delta in handle.generate.remote(request):
        by_handle[delta.index] += delta.token_ids
    assert by_handle == {choice["index"]: choice["token_ids"] for choice in by_http}


def test_metrics_have_every_worker(live: LiveService) -> None:
    live.complete(BASE_ID, max_tokens=9).raise_for_status()

    def made() -> dict[str, float]:
        families = text_string_to_metric_families(live.http.get("/metrics").raise_for_status().text)
        (tokens,) = [family for family in families if family.name == "vllm:generation_tokens"]
        return {sample.labels["engine"]: sample.value for sample in tokens.samples}

    eventually(lambda: set(made()) == live.worker_ids() and sum(made().values()) >= 9)


def test_nothing_is_left_of_clients_that_vanish(live: LiveService) -> None:
    """Of 100 streams 80 hang up at random points; the other 20 end as they would have."""
    live.put("shout", "one", warm="all").raise_for_status()
    body = {"model": "shout", "prompt": "Hello", "max_tokens": 64, "temperature": 0, "ignore_eos": True, "stream": True}
    expected = live.complete("shout", max_tokens=64).raise_for_status().json()["choices"][0]["text"]
    rng = random.Random(0)
    ends: list[str] = []

    def read(num_events: int | None) -> None:
        # The place of one who left is free once the service has seen it go. Until then a newcomer is told to wait.
        eventually(lambda: may_read(num_events), 20.0)

    def may_read(num_events: int | None) -> bool:
        with live.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                return False
            assert response.status_code == 200
            texts: list[str] = []
            for line in response.iter_lines():
                if num_events is not None and len(texts) >= num_events:
                    return True
                if line.startswith("data: {"):
                    texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
            if num_events is None:  # a late reader gets fewer events, so others may come to the end too
                ends.append("".join(texts))
        return True

    # As many at once as the workers take and may wait: 2 * 32 + 16.
    plan: list[int | None] = [None] * 20 + [rng.randrange(0, 40) for _ in range(80)]
    rng.shuffle(plan)
    with ThreadPoolExecutor(80) as pool:
        list(pool.map(read, plan))
    eventually(lambda: is_idle(live), 2.0)
    assert len(ends) == 20
    assert set(ends) == {expected}


def test_more_adapters_than_fit_are_all_served_right(live: LiveService) -> None:
    """Ten adapters of which a worker's pool holds four, drawn by a Zipf law; the pinned one never leaves."""
    names = [f"a{i}" for i in range(10)]
    alone: dict[str, str] = {}
    for i, name in enumerate(names):
        live.put(name, f"many{i}", pinned=i == 9, warm=0).raise_for_status()
        alone[name] = live.complete(name, max_tokens=12).raise_for_status().json()["choices"][0]["text"]
    assert len(set(alone.values())) == len(names)
    pinned = live.adapter("a9")["version"]
    rng = random.Random(1)
    drawn = rng.choices(names, [1 / (rank + 1) for rank in range(len(names))], k=120)
    gate = threading.Semaphore(24)
    wrong: list[str] = []

    def ask(name: str) -> None:
        with gate:
            text = live.complete(name, max_tokens=12).raise_for_status().json()["choices"][0]["text"]
        if text != alone[name]:
            wrong.append(name)

    with ThreadPoolExecutor(48) as pool:
        futures = [pool.submit(ask, name) for name in drawn]
        while not all(future.done() for future in futures):
            for worker in live.workers():
                assert pinned in {held["version"] for held in worker["adapters"]}
                used = sum(held["pages"] for held in worker["adapters"])
                assert used == worker["adapter_pages"]["used"] <= worker["adapter_pages"]["total"]
        for future in futures:
            future.result()
    assert wrong == []
    eventually(lambda: is_idle(live), 2.0)
