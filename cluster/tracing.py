"""Traces of requests as OpenTelemetry's spans, sent as OTLP over HTTP to the endpoint of `tracing.endpoint`.

A request's spans are made when it ends, from the times that its timer has kept, so a token costs nothing. They belong
to the trace that the caller names in `traceparent`. The SDK reads the rest from its own variables, such as
`OTEL_EXPORTER_OTLP_HEADERS`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol, get_args

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lorafleet.workers.request import FinishReason

SERVICE = "lorafleet"
CLOSE_MS = 2000
"""How long an ingress that ends waits for the collector."""

caller_ids: ContextVar[Mapping[str, str]] = ContextVar("caller_ids", default={})  # noqa: B039
"""Of the request that runs: `x-request-id`, and `traceparent` and `tracestate` where the caller sent them."""

_FINISH_REASONS = get_args(FinishReason)


class Timed(Protocol):
    """A request that has ended: `metrics.RequestTimer`. Times are of the monotonic clock."""

    adapter: str
    begun_s: float
    stages_s: dict[str, float]
    first_token_s: float | None
    last_token_s: float
    first_byte_s: float | None
    waits_s: tuple[float, float] | None
    worker_id: str
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    caller_ids: Mapping[str, str]


class Traces:
    """Sends a span for each request, with a child for each of its stages."""

    def __init__(self, exporter: SpanExporter, sample_ratio: float) -> None:
        """sample_ratio: of the requests whose callers have not decided."""
        sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._provider = TracerProvider(sampler, Resource.create({"service.name": SERVICE}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, sample_ratio: float) -> Traces:
        """Traces for a collector. Raises ImportError without the extra `tracing`."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ImportError("tracing.endpoint is set: install the extra, lorafleet[tracing], or unset it") from error
        return cls(OTLPSpanExporter(endpoint=endpoint), sample_ratio)

    def record(self, timer: Timed, outcome: str, now_s: float) -> None:
        """A request ended."""
        offset_ns = time.time_ns() - round(now_s * 1e9)

        def at(time_s: float) -> int:
            return round(time_s * 1e9) + offset_ns

        span = self._tracer.start_span(
            "generate",
            self._propagator.extract(timer.caller_ids),
            SpanKind.SERVER,
            _attributes(timer, outcome),
            start_time=at(timer.begun_s),
        )
        if span.is_recording():
            for name, begun_s, ended_s in stages(timer):
                self._stage(span, name, at(begun_s), at(ended_s))
            if outcome not in (*_FINISH_REASONS, "disconnect"):
                span.set_status(StatusCode.ERROR, outcome)
        span.end(at(now_s))

    def _stage(self, span: Span, name: str, begun_ns: int, ended_ns: int) -> None:
        self._tracer.start_span(name, set_span_in_context(span), start_time=begun_ns).end(ended_ns)

    def close(self) -> None:
        """Send what is left, as far as the collector takes it in time."""
        self._provider.force_flush(CLOSE_MS)
        self._provider.shutdown()


def stages(timer: Timed) -> Iterator[tuple[str, float, float]]:
    """Yield name, beginning and end of each stage that a request has had, in their order, on the timer's clock."""
    begun_s = timer.begun_s
    for name, duration_s in timer.stages_s.items():
        yield name, begun_s, begun_s + duration_s
        begun_s += duration_s
    if timer.first_token_s is None:
        return
    if timer.waits_s is None:
        yield "wait", begun_s, timer.first_token_s
    else:
        # The worker's clock is another one: its durations are set before the first token's arrival.
        queue_s, prefill_s = timer.waits_s
        admitted_s = max(begun_s, timer.first_token_s - prefill_s)
        queued_s = max(begun_s, admitted_s - queue_s)
        yield "route", begun_s, queued_s
        yield "queue", queued_s, admitted_s
        yield "prefill", admitted_s, timer.first_token_s
    if timer.first_byte_s is not None:
        yield "first_byte", timer.first_token_s, timer.first_byte_s
    yield "decode", timer.first_token_s, timer.last_token_s


def _attributes(timer: Timed, outcome: str) -> dict[str, Any]:
    """Attributes of a request's span: names of OpenTelemetry's conventions for generative AI, and ours for the rest."""
    ending = {"gen_ai.response.finish_reasons": [outcome]} if outcome in _FINISH_REASONS else {"error.type": outcome}
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": timer.adapter,
        "gen_ai.usage.input_tokens": timer.num_prompt_tokens,
        "gen_ai.usage.output_tokens": timer.num_tokens,
        "lorafleet.cached_tokens": timer.num_cached_tokens,
        "lorafleet.worker": timer.worker_id,
        "lorafleet.request_id": timer.caller_ids.get("x-request-id", ""),
        **ending,
    }
