"""Spans of requests, as OpenTelemetry's own exporters and messages have them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.tracing import Traces, caller_ids
from tests.cluster.serving import BASE_ID, Service, serving
from tests.support.clock import Clock
from tests.support.wait import eventually

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A collector's URL, and what it has got."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") is None and self.path == "/v1/traces":
                got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_request_is_a_span_of_its_callers_trace_with_its_waits() -> None:
    exporter, clock = InMemorySpanExporter(), Clock()
    traces = Traces(exporter, 0.0)
    caller_ids.set({"x-request-id": "mine", "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
    timer = RequestMetrics(clock=clock, traces=traces).begin("shout")
    for stage in ("resolve", "tokenize"):
        clock.now_s += 1
        timer.end_stage(stage)
    clock.now_s += 10
    timer.note_waits("w1", (3.0, 5.0))
    timer.note_tokens(1)
    clock.now_s += 1
    timer.note_first_byte()
    clock.now_s += 1
    timer.note_tokens(2)
    timer.note_prompt(7, 4)
    clock.now_s += 1
    timer.end("stop")
    traces.close()
    *children, root = sorted(exporter.get_finished_spans(), key=lambda span: span.name == "generate")
    assert root.kind is SpanKind.SERVER
    assert root.parent is not None
    assert (f"{root.parent.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert root.start_time is not None
    assert root.end_time is not None
    assert root.end_time - root.start_time == 15 * 10**9
    attributes = dict(root.attributes or {})
    assert attributes["gen_ai.usage.input_tokens"] == 7
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["lorafleet.request_id"] == "mine"
    times = {}
    for span in children:
        assert span.parent is not None
        assert span.parent.span_id == root.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        begun_ns, ended_ns = span.start_time - root.start_time, span.end_time - root.start_time
        times[span.name] = (begun_ns / 1e9, ended_ns / 1e9)
    assert times == {
        "resolve": (0, 1),
        "tokenize": (1, 2),
        "route": (2, 4),
        "queue": (4, 7),
        "prefill": (7, 12),
        "first_byte": (12, 13),
        "decode": (12, 14),
    }


@pytest.mark.parametrize(("flags", "ratio", "is_traced"), [("00", 1.0, False), (None, 0.0, False), (None, 1.0, True)])
def test_the_caller_decides_whether_it_is_traced_and_else_the_ratio(
    flags: str | None, ratio: float, is_traced: bool
) -> None:
    exporter = InMemorySpanExporter()
    traces = Traces(exporter, ratio)
    caller_ids.set({} if flags is None else {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flags}"})
    RequestMetrics(traces=traces).begin("shout").end("stop")
    traces.close()
    assert bool(exporter.get_finished_spans()) is is_traced


def test_http_requests_reach_a_collector(
    collector: tuple[str, list[ExportTraceServiceRequest]],
) -> None:
    """So do those of a refused request, and of one whose header is no trace context."""
    url, got = collector
    traces = Traces.to(url, 1.0)
    named: set[str] = set()
    with serving(Service(metrics=RequestMetrics(traces=traces))) as service:
        for model, parent in ((BASE_ID, f"00-{TRACE_ID}-{PARENT_ID}-01"), ("nobody", ""), (BASE_ID, "🦊")):
            headers = {b"traceparent": parent.encode(), b"x-request-id": f"my-{model}".encode()}
            body = {"model": model, "prompt": "Hello", "stream": True}
            reply = httpx.post(f"{service.url}/v1/completions", json=body, headers=headers)
            assert reply.headers["x-request-id"] == f"my-{model}"
    traces.close()

    def spans() -> dict[str, list[tuple[str, int]]]:
        found: dict[str, list[tuple[str, int]]] = {}
        for span in (s for each in got for r in each.resource_spans for scope in r.scope_spans for s in scope.spans):
            found.setdefault(span.name, []).append((span.trace_id.hex(), span.status.code))
            named.update(each.value.string_value for each in span.attributes if each.key == "lorafleet.request_id")
        return found

    eventually(lambda: len(spans().get("generate", [])) == 3)
    roots = spans()["generate"]
    assert named == {f"my-{BASE_ID}", "my-nobody"}
    assert roots[0] == (TRACE_ID, StatusCode.UNSET.value)
    assert roots[1][1] == StatusCode.ERROR.value
    assert roots[2][0] != TRACE_ID
    assert len(spans()["first_byte"]) == len(spans()["decode"]) == 2


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match=r"lorafleet\[tracing\]"):
        Traces.to("http://127.0.0.1:1/v1/traces", 1.0)
