"""GET /metrics, as Prometheus' own parser reads it."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.cluster.serving.exposition import FRESH_S, Exposition
from lorafleet.cluster.wire import WorkerCounts
from lorafleet.workers.state import AdapterPages, KVPages, WorkerState
from lorafleet.workers.stats import Distribution, ServedCounts
from tests.cluster.serving import BASE_ID, Service

Labels = tuple[tuple[str, str], ...]


def samples_of(text: str) -> dict[tuple[str, Labels], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counts_are_those_of_the_replies(worker_service: Service) -> None:
    client = worker_service.client()
    asked = [("shout", "Hello there", 5), (BASE_ID, "Hello there", 1), ("shout", "Hello there, you", 7)]
    usages = [
        client.completions.create(model=model, prompt=prompt, max_tokens=n, extra_body={"ignore_eos": True}).usage
        for model, prompt, n in asked
    ]
    with worker_service.http() as http:
        reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    found = samples_of(reply.text)
    labels = (("engine", "w0"), ("model_name", BASE_ID))
    assert found["vllm:prompt_tokens_total", labels] == sum(usage.prompt_tokens for usage in usages if usage)
    assert found["vllm:generation_tokens_total", labels] == 13
    assert found["vllm:num_requests_running", labels] == found["vllm:num_requests_waiting", labels] == 0
    assert found["vllm:request_success_total", (labels[0], ("finished_reason", "length"), labels[1])] == 3
    for name, count in (
        ("time_to_first_token_seconds", 3),
        ("request_queue_time_seconds", 3),
        ("request_prefill_time_seconds", 3),
        ("e2e_request_latency_seconds", 3),
        ("request_time_per_output_token_seconds", 2),
    ):
        assert found[f"vllm:{name}_count", labels] == count
        assert found[f"vllm:{name}_sum", labels] > 0
    queued, computed = (found[f"vllm:request_{name}_time_seconds_sum", labels] for name in ("queue", "prefill"))
    assert queued + computed == pytest.approx(found["vllm:time_to_first_token_seconds_sum", labels])


def test_a_distribution_counts_as_a_loop_would() -> None:
    distribution, values = Distribution((0.5, 1.0, 2.0)), [0.1, 0.5, 0.6, 1.0, 1.5, 2.0, 7.0]
    for value in values:
        distribution.note(value)
    expected = Counter(next((b for b in distribution.bounds if v <= b), math.inf) for v in values)
    assert distribution.counts == [expected[bound] for bound in (*distribution.bounds, math.inf)]


async def test_scrapes_share_an_answer_for_a_while() -> None:
    now_s, num_asked = 0.0, 0

    async def ask() -> list[WorkerCounts]:
        nonlocal num_asked
        num_asked += 1
        state = WorkerState(
            worker_id='a"b\n',
            pid=1,
            node_id="n",
            device="cpu",
            running=num_asked,
            waiting=0,
            leases=0,
            kv_pages=KVPages(used=1, cached=0, total=4),
            adapter_pages=AdapterPages(used=0, total=0),
            adapters=(),
        )
        return [WorkerCounts(state, ServedCounts())]

    exposition = Exposition("m", ask, clock=lambda: now_s)
    first = await exposition.text()
    assert await exposition.text() == first
    now_s += FRESH_S
    again = samples_of((await exposition.text()).decode())
    labels = (("engine", 'a"b\n'), ("model_name", "m"))
    assert (num_asked, again["vllm:num_requests_running", labels]) == (2, 2)
    assert again["vllm:kv_cache_usage_perc", labels] == 0.25
