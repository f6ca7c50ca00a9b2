"""Metrics of the service, through `ray.util.metrics`. Names are in vLLM's style: `lorafleet_...`.

The ingress measures requests, each worker itself and its adapters, the store what it keeps. A request is recorded when
it ends, not token by token. Adapter labels are bounded: the first `MAX_ADAPTER_LABELS` adapters that are used have one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

from lorafleet.cluster.tracing import Traces, caller_ids
from lorafleet.workers.state import WorkerState
from lorafleet.workers.stats import LATENCY_BOUNDS_S, TOKEN_BOUNDS_S, EngineStats

if TYPE_CHECKING:
    from lorafleet.workers.memory.residency import ResidencySnapshot  # imports torch, which ingresses do without

MAX_ADAPTER_LABELS = 100
OTHER = "other"

_LATENCY_S = list(LATENCY_BOUNDS_S)
_TOKEN_S = list(TOKEN_BOUNDS_S)
_LOAD_S = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0]


class AdapterLabels:
    """Gives each adapter a label until `max_labels` have one; all others share `other`."""

    def __init__(self, max_labels: int = MAX_ADAPTER_LABELS) -> None:
        self._max_labels = max_labels
        self._labels: set[str] = set()

    def label(self, name: str) -> str:
        """The label of an adapter that is used now."""
        if name not in self._labels:
            if len(self._labels) >= self._max_labels:
                return OTHER
            self._labels.add(name)
        return name


class RequestMetrics:
    """The requests of the data plane."""

    def __init__(
        self,
        *,
        labels: AdapterLabels | None = None,
        clock: Callable[[], float] = time.monotonic,
        traces: Traces | None = None,
    ) -> None:
        self._labels = labels or AdapterLabels()
        self._traces = traces
        self._clock = clock
        adapter = ("adapter",)
        self._requests = Counter(
            "lorafleet_requests",
            "Requests that ended, by outcome: a finish reason or an error code.",
            (*adapter, "outcome"),
        )
        self._prompt_tokens = Counter("lorafleet_prompt_tokens", "Prompt tokens of requests that ended.", adapter)
        self._cached_tokens = Counter(
            "lorafleet_prefix_cached_tokens", "Prompt tokens that came from the prefix cache.", adapter
        )
        self._generation_tokens = Counter("lorafleet_generation_tokens", "Tokens made.", adapter)
        self._first_token_s = Histogram(
            "lorafleet_time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCY_S, adapter
        )
        self._token_s = Histogram(
            "lorafleet_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first.",
            _TOKEN_S,
            adapter,
        )
        self._stage_s = Histogram(
            "lorafleet_request_stage_seconds",
            "Time of a request in the ingress: `resolve` (its name), `tokenize`, `first_byte` (a token's way out).",
            _LATENCY_S,
            ("stage",),
        )
        self._latency_s = Histogram(
            "lorafleet_e2e_request_latency_seconds", "From a request's arrival to its end.", _LATENCY_S, adapter
        )

    def begin(self, adapter: str) -> RequestTimer:
        """A request has arrived. `adapter` is a name that exists, or the base id."""
        return RequestTimer(self, adapter, self._clock)

    def reject(self, timer: RequestTimer, outcome: str) -> None:
        """A request ended before it was known what it is for."""
        self._requests.inc(1, {"adapter": "", "outcome": outcome})
        self._trace(timer, outcome, self._clock())

    def record(self, timer: RequestTimer, outcome: str, now_s: float) -> None:
        """A request ended."""
        tags = {"adapter": self._labels.label(timer.adapter)}
        self._requests.inc(1, {**tags, "outcome": outcome})
        _inc(self._prompt_tokens, timer.num_prompt_tokens, tags)
        _inc(self._cached_tokens, timer.num_cached_tokens, tags)
        _inc(self._generation_tokens, timer.num_tokens, tags)
        for stage, duration_s in timer.stages_s.items():
            self._stage_s.observe(duration_s, {"stage": stage})
        if timer.first_byte_s is not None and timer.first_token_s is not None:
            self._stage_s.observe(timer.first_byte_s - timer.first_token_s, {"stage": "first_byte"})
        self._latency_s.observe(now_s - timer.begun_s, tags)
        if timer.first_token_s is not None:
            self._first_token_s.observe(timer.first_token_s - timer.begun_s, tags)
            if timer.num_tokens > timer.num_first_tokens:
                rest = timer.num_tokens - timer.num_first_tokens
                self._token_s.observe((timer.last_token_s - timer.first_token_s) / rest, tags)
        self._trace(timer, outcome, now_s)

    def _trace(self, timer: RequestTimer, outcome: str, now_s: float) -> None:
        if self._traces is not None:
            self._traces.record(timer, outcome, now_s)


class RequestTimer:
    """One request, from its arrival to `end`, which may be called again without effect."""

    __slots__ = (
        "_clock",
        "_is_ended",
        "_metrics",
        "_stage_began_s",
        "adapter",
        "begun_s",
        "caller_ids",
        "first_byte_s",
        "first_token_s",
        "last_token_s",
        "num_cached_tokens",
        "num_first_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "stages_s",
        "waits_s",
        "worker_id",
    )

    def __init__(self, metrics: RequestMetrics, adapter: str, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._is_ended = False
        self.adapter = adapter
        self.begun_s = clock()
        self._stage_began_s = self.begun_s
        self.stages_s: dict[str, float] = {}
        """Stages that are over, and how long each took."""
        self.caller_ids = caller_ids.get()
        self.first_token_s: float | None = None
        self.first_byte_s: float | None = None
        """When the first event was with the server; None where there was none."""
        self.waits_s: tuple[float, float] | None = None
        """Seconds in the worker's queue, and from then to the first token, as the worker says."""
        self.worker_id = ""
        self.last_token_s = self.begun_s
        self.num_first_tokens = 0
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    def end_stage(self, stage: str) -> None:
        """A stage, which began with the end of the one before it, is over. Only its first end counts."""
        if stage not in self.stages_s:
            now_s = self._clock()
            self.stages_s[stage], self._stage_began_s = now_s - self._stage_began_s, now_s

    def note_tokens(self, num_tokens: int) -> None:
        """A message with this many tokens has arrived."""
        if not num_tokens:
            return
        self.last_token_s = self._clock()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
            self.num_first_tokens = num_tokens
        self.num_tokens += num_tokens

    def forget_tokens(self, num_tokens: int) -> None:
        """A worker was lost with this many tokens, which nobody has seen; another makes them again."""
        self.num_tokens -= num_tokens

    def note_first_byte(self) -> None:
        """The first event is with the server, on its way to the client."""
        if self.first_byte_s is None:
            self.first_byte_s = self._clock()

    def note_waits(self, worker_id: str, waits_s: tuple[float, float] | None) -> None:
        """A worker has begun the answer, after these waits."""
        self.worker_id, self.waits_s = worker_id, waits_s

    def note_prompt(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Count the prompt's tokens, and those that were cached."""
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = num_cached_tokens

    def end(self, outcome: str) -> None:
        """The request ended: a finish reason, `disconnect`, or an error's code."""
        if not self._is_ended:
            self._is_ended = True
            self._metrics.record(self, outcome, self._clock())


class QueueMetrics:
    """The requests that found every worker full."""

    def __init__(self) -> None:
        self._queued = Gauge("lorafleet_num_requests_queued", "Requests that wait for a worker with room.")
        self._num_queued = 0
        self._routing_s = Histogram(
            "lorafleet_request_routing_seconds", "How long a request waited for a worker with room.", _LATENCY_S
        )

    def note_routed(self, duration_s: float) -> None:
        """A request waited so long for its worker."""
        self._routing_s.observe(duration_s)

    def publish(self, num_queued: int) -> None:
        """Set the gauge, if it has changed."""
        if num_queued != self._num_queued:
            self._num_queued = num_queued
            self._queued.set(num_queued)


class WorkerMetrics:
    """One worker, published about once a second."""

    def __init__(self, worker_id: str) -> None:
        self._tags = {"worker": worker_id}
        worker = ("worker",)
        self._running = Gauge("lorafleet_num_requests_running", "Sequences in the running batch.", worker)
        self._waiting = Gauge("lorafleet_num_requests_waiting", "Sequences that wait to be admitted.", worker)
        self._batch = Gauge("lorafleet_batch_sequences", "Sequences in the last step.", worker)
        self._batch_tokens = Gauge("lorafleet_batch_tokens", "Tokens in the last step.", worker)
        self._kv_pages = Gauge("lorafleet_kv_pages", "KV pages: used, cached or free.", (*worker, "state"))
        self._kv_usage = Gauge(
            "lorafleet_kv_cache_usage_perc", "Share of the KV pages that live requests hold.", worker
        )
        self._adapter_pages = Gauge("lorafleet_adapter_pages", "Adapter pages: used or free.", (*worker, "state"))
        self._adapters = Gauge("lorafleet_adapters", "Adapters by tier: device, host or disk.", (*worker, "tier"))
        self._leases = Gauge("lorafleet_adapter_leases", "Requests that hold an adapter.", worker)
        self._steps = Counter("lorafleet_steps", "Steps of the engine.", worker)
        self._loads = Counter("lorafleet_adapter_loads", "Adapters loaded to the device.", worker)
        self._evictions = Counter("lorafleet_adapter_evictions", "Adapters evicted from the device for room.", worker)
        self._reloads = Counter("lorafleet_adapter_reloads", "Loads of adapters that had been evicted.", worker)
        self._finished = Counter(
            "lorafleet_sequences_finished", "Sequences that ended, by reason.", (*worker, "reason")
        )
        self._step_s = Histogram("lorafleet_step_seconds", "Time of a step.", _TOKEN_S, worker)
        self._load_s = Histogram(
            "lorafleet_adapter_load_seconds", "From the wish for an adapter to it.", _LOAD_S, worker
        )
        self._silent_s = Gauge(
            "lorafleet_rank_silent_seconds", "Since a rank of a worker's group was last heard.", (*worker, "rank")
        )
        self._counted: dict[tuple[str, ...], int] = {}

    def publish(
        self, state: WorkerState, residency: ResidencySnapshot, stats: EngineStats, load_s: deque[float]
    ) -> None:
        """Set the gauges, add to the counters what has happened since the last call, and take the durations."""
        tags = self._tags
        self._running.set(state.running, tags)
        self._waiting.set(state.waiting, tags)
        self._leases.set(state.leases, tags)
        self._batch.set(stats.last_batch_sequences if state.running else 0, tags)
        self._batch_tokens.set(stats.last_batch_tokens if state.running else 0, tags)
        kv, pages = state.kv_pages, state.adapter_pages
        self._kv_usage.set(kv.used / kv.total if kv.total else 0.0, tags)
        for name, value in (("used", kv.used), ("cached", kv.cached), ("free", kv.total - kv.used - kv.cached)):
            self._kv_pages.set(value, {**tags, "state": name})
        for name, value in (("used", pages.used), ("free", pages.total - pages.used)):
            self._adapter_pages.set(value, {**tags, "state": name})
        self._adapters.set(sum(adapter.state != "loading" for adapter in state.adapters), {**tags, "tier": "device"})
        for rank in state.ranks[1:]:
            self._silent_s.set(rank.silent_s, {**tags, "rank": str(rank.rank)})
        self._count(self._steps, stats.num_steps, "steps")
        self._count(self._loads, residency.loads, "loads")
        self._count(self._evictions, residency.evictions, "evictions")
        self._count(self._reloads, residency.reloads_after_eviction, "reloads")
        for reason, num_finished in list(stats.served.num_finished.items()):
            self._count(self._finished, num_finished, "finished", reason)
        _observe(self._step_s, stats.take(stats.step_s), tags)
        _observe(self._load_s, stats.take(load_s), tags)

    def _count(self, counter: Counter, total: int, kind: str, reason: str | None = None) -> None:
        key = (kind, reason or "")
        tags = self._tags if reason is None else {**self._tags, "reason": reason}
        _inc(counter, total - self._counted.get(key, 0), tags)
        self._counted[key] = total


class StoreMetrics:
    """Metrics of the adapter store."""

    def __init__(self) -> None:
        self._adapters = Gauge("lorafleet_adapters", "Adapters by tier: device, host or disk.", ("worker", "tier"))
        self._host_bytes = Gauge("lorafleet_adapter_host_bytes", "Bytes of adapter weights in host memory.")
        self._problems = Gauge(
            "lorafleet_store_problems",
            "What is damaged in the state folder; whether it can be written.",
            ("code",),
        )

    def publish(self, *, num_on_disk: int, num_in_host_memory: int, host_bytes: int) -> None:
        """Set the gauges."""
        self._adapters.set(num_on_disk, {"worker": "", "tier": "disk"})
        self._adapters.set(num_in_host_memory, {"worker": "", "tier": "host"})
        self._host_bytes.set(host_bytes)

    def publish_problems(self, counts: Mapping[str, int]) -> None:
        """Set the gauge of each code of a `StoreProblem`."""
        for code in ("store_damaged", "store_full", "store_not_writable"):
            self._problems.set(counts.get(code, 0), {"code": code})


def _inc(counter: Counter, by: int, tags: dict[str, str]) -> None:
    if by > 0:  # Ray refuses to add nothing
        counter.inc(by, tags)


def _observe(histogram: Histogram, values: Iterable[float], tags: dict[str, str]) -> None:
    for value in values:
        histogram.observe(value, tags)
