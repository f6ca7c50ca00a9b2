"""Counts of all workers as Prometheus' text, under vLLM's names where they mean the same.

Any ingress gives the same answer: the counts are the workers', and `engine` names the worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafleet.cluster.wire import WorkerCounts
from lorafleet.workers.stats import Distribution

FRESH_S = 0.5
"""Scrapes within this time share an answer: the route needs no key, and each answer asks every worker."""

LABELS = ("model_name", "engine")

GAUGES: Sequence[tuple[str, str, Callable[[WorkerCounts], float]]] = (
    ("vllm:num_requests_running", "Sequences in the running batch.", lambda counts: counts.state.running),
    ("vllm:num_requests_waiting", "Sequences that wait to be admitted.", lambda counts: counts.state.waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the KV pages that live requests hold; 1 is all of them.",
        lambda counts: counts.state.kv_pages.used / max(1, counts.state.kv_pages.total),
    ),
)
COUNTERS: Sequence[tuple[str, str, Callable[[WorkerCounts], float]]] = (
    ("vllm:prompt_tokens", "Prompt tokens that were computed or cached.", lambda c: c.served.num_prompt_tokens),
    ("vllm:generation_tokens", "Tokens made.", lambda c: c.served.num_generated_tokens),
    ("vllm:prefix_cache_queries", "Prompt tokens looked for in the cache.", lambda c: c.served.num_prompt_tokens),
    ("vllm:prefix_cache_hits", "Prompt tokens that the prefix cache had.", lambda c: c.served.num_cached_tokens),
    ("vllm:spec_decode_num_draft_tokens", "Tokens that were guessed.", lambda c: c.served.num_guessed_tokens),
    ("vllm:spec_decode_num_accepted_tokens", "Guesses that came true.", lambda c: c.served.num_confirmed_tokens),
    ("vllm:num_preemptions", "Sequences that gave their KV pages back.", lambda c: c.served.num_preemptions),
)
HISTOGRAMS: Sequence[tuple[str, str, Callable[[WorkerCounts], Distribution]]] = (
    (
        "vllm:time_to_first_token_seconds",
        "From a sequence's arrival at its worker to its first token.",
        lambda counts: counts.served.first_token_s,
    ),
    (
        "vllm:request_queue_time_seconds",
        "From a sequence's arrival at its worker to its admission, the load of its adapter included.",
        lambda counts: counts.served.queue_s,
    ),
    (
        "vllm:request_prefill_time_seconds",
        "From a sequence's admission to its first token.",
        lambda counts: counts.served.prefill_s,
    ),
    (
        "vllm:request_time_per_output_token_seconds",
        "Mean time of a sequence's tokens after the first.",
        lambda counts: counts.served.token_s,
    ),
    (
        "vllm:e2e_request_latency_seconds",
        "From a sequence's arrival at its worker to its end.",
        lambda counts: counts.served.request_s,
    ),
)


class Exposition:
    """The metrics of one service."""

    def __init__(
        self,
        model: str,
        ask: Callable[[], Awaitable[Sequence[WorkerCounts]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """ask: the counts of all workers that answer."""
        self._model = model
        self._ask = ask
        self._clock = clock
        self._lock = asyncio.Lock()
        self._text = b""
        self._good_until_s = float("-inf")

    async def text(self) -> bytes:
        """Prometheus' text format."""
        async with self._lock:
            if self._clock() >= self._good_until_s:
                registry = CollectorRegistry()
                registry.register(_Families(self._model, await self._ask()))
                self._text = generate_latest(registry)
                self._good_until_s = self._clock() + FRESH_S
            return self._text


class _Families(Collector):
    """The metrics at one moment."""

    def __init__(self, model: str, workers: Sequence[WorkerCounts]) -> None:
        self._workers = [((model, counts.state.worker_id), counts) for counts in workers]

    def collect(self) -> Iterator[Metric]:
        for name, meaning, value in GAUGES:
            gauge = GaugeMetricFamily(name, meaning, labels=LABELS)
            for labels, counts in self._workers:
                gauge.add_metric(labels, value(counts))
            yield gauge
        for name, meaning, value in COUNTERS:
            counter = CounterMetricFamily(name, meaning, labels=LABELS)
            for labels, counts in self._workers:
                counter.add_metric(labels, value(counts))
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Sequences that ended, by reason.", labels=(*LABELS, "finished_reason")
        )
        for labels, counts in self._workers:
            for reason, count in sorted(counts.served.num_finished.items()):
                finished.add_metric((*labels, reason), count)
        yield finished
        for name, meaning, distribution in HISTOGRAMS:
            histogram = HistogramMetricFamily(name, meaning, labels=LABELS)
            for labels, counts in self._workers:
                found = distribution(counts)
                bounds = [*map(str, found.bounds), "+Inf"]
                histogram.add_metric(
                    labels, list(zip(bounds, map(float, accumulate(found.counts)), strict=True)), found.total
                )
            yield histogram
