"""What crosses a process: reports survive Serve's dict, and one of another build is no report."""

from __future__ import annotations

import json
import pickle

from lorafleet.cluster.wire import Estimate, NamedVersion, RoutingReport

REPORT = RoutingReport(("0a", "1b"), free_pages=7, answering=(("a" * 32, 3), ("b" * 32, 1)))


def test_a_report_survives_serves_dict() -> None:
    assert RoutingReport.unpacked(json.loads(json.dumps(REPORT.packed()))) == REPORT


def test_a_report_of_another_build_counts_as_none() -> None:
    assert RoutingReport.unpacked(REPORT.packed() | {"wire_version": 0}) == RoutingReport()
    assert RoutingReport.unpacked({"resident": ["0a"], "free_pages": 7}) == RoutingReport()
    assert RoutingReport.unpacked(None) == RoutingReport()


def test_what_crosses_survives_pickling() -> None:
    for value in (REPORT, NamedVersion("shout", "0a", "demo/shout"), Estimate("w0", 3, ("0a",), None)):
        assert pickle.loads(pickle.dumps(value)) == value
