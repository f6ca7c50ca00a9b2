"""benchmarks/step_sizes.py plays all of a load's requests, at the times that it should."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def step_sizes(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("step_sizes")


def test_a_load_that_waits_for_nothing_takes_what_its_steps_take(step_sizes: ModuleType) -> None:
    load = step_sizes.Load("one", prompt=100, output=5, clients=1, requests=3, way_ms=0.0)
    figures = step_sizes.play(load, step_sizes.StepBudget(8192))
    first, gap = step_sizes.step_ms(0, 100), step_sizes.step_ms(1, 0)
    assert [figures[f"first_token_ms_{share}"] for share in ("p50", "p99")] == pytest.approx([first, first])
    assert [figures[f"gap_ms_{share}"] for share in ("p50", "p99")] == pytest.approx([gap, gap])
    assert figures["output_tokens_per_s"] == pytest.approx(15e3 / (3 * (first + 4 * gap)))


def test_every_load_has_a_line_for_each_way_to_size_steps(step_sizes: ModuleType) -> None:
    loads = (
        step_sizes.Load("clients", prompt=300, output=3, clients=6, requests=2, way_ms=2.0),
        step_sizes.Load("rate", prompt=300, output=3, rate=30, requests=9),
    )
    lines = list(step_sizes.measure(loads))
    assert [(line["case"], line["steps"]) for line in lines] == [
        (load.name, steps) for load in loads for steps in step_sizes.BUDGETS
    ]
