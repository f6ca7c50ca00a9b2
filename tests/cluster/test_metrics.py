"""What is measured of a request, and that labels stay few."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.cluster.metrics import OTHER, AdapterLabels, RequestMetrics
from tests.support.clock import Clock


class Recorder:
    """In the place of a Ray metric."""

    def __init__(self, name: str, records: list[tuple[str, float, dict[str, str]]]) -> None:
        self._name = name
        self._records = records

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses to add nothing"
        self._records.append((self._name, value, tags))

    observe = inc


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    records: list[tuple[str, float, dict[str, str]]] = []
    for kind in ("Counter", "Histogram"):
        monkeypatch.setattr(f"lorafleet.cluster.metrics.{kind}", lambda name, *_: Recorder(name, records))
    return records


def by_name(records: list[Any]) -> dict[str, float]:
    return {name.removeprefix("lorafleet_"): value for name, value, _ in records}


def test_stages_follow_one_another_and_count_once(records: list[Any]) -> None:
    clock = Clock(100.0)
    timer = RequestMetrics(clock=clock).begin("shout")
    clock.now_s = 100.25
    timer.end_stage("resolve")
    clock.now_s = 101.0
    timer.end_stage("tokenize")
    clock.now_s = 105.0
    timer.end_stage("resolve")
    timer.end("stop")
    stages = {tags["stage"]: value for name, value, tags in records if name == "lorafleet_request_stage_seconds"}
    assert stages == {"resolve": 0.25, "tokenize": 0.75}


def test_a_request_is_timed_by_the_tokens_it_gets(records: list[Any]) -> None:
    clock = Clock(100.0)
    timer = RequestMetrics(clock=clock).begin("shout")
    clock.now_s = 100.5
    timer.note_prompt(12, 4)
    timer.note_tokens(1)
    clock.now_s = 102.5
    timer.note_tokens(4)
    clock.now_s = 103.0
    timer.end("stop")
    timer.end("disconnect")
    assert by_name(records) == {
        "requests": 1,
        "prompt_tokens": 12,
        "prefix_cached_tokens": 4,
        "generation_tokens": 5,
        "time_to_first_token_seconds": 0.5,
        "time_per_output_token_seconds": 0.5,
        "e2e_request_latency_seconds": 3.0,
    }
    assert {tags["adapter"] for _, _, tags in records} == {"shout"}
    assert records[0][2]["outcome"] == "stop"


def test_a_request_without_tokens_has_only_an_outcome_and_a_latency(records: list[Any]) -> None:
    clock = Clock(100.0)
    timer = RequestMetrics(clock=clock).begin("shout")
    clock.now_s = 101.0
    timer.end("overloaded")
    assert by_name(records) == {"requests": 1, "e2e_request_latency_seconds": 1.0}


def test_labels_are_bounded_and_those_that_came_first_keep_theirs() -> None:
    labels = AdapterLabels(max_labels=3)
    assert [labels.label(f"a{i}") for i in range(5)] == ["a0", "a1", "a2", OTHER, OTHER]
    assert labels.label("a1") == "a1"
    assert labels.label("a4") == OTHER
