"""What the scripts of `benchmarks/` say of where their figures are from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_a_machine_without_git_measures_too(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = script("bars")
    monkeypatch.setenv("PATH", "")
    assert bars.commit() == "unknown"
    assert bars.cpu_name()


def test_the_last_run_of_each_setup_is_found(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    bars, path = script("bars"), tmp_path / "lines.jsonl"
    runs = [("a", 1, 5.0), ("a", 1, 6.0), ("b", 2, 7.0), ("c", 1, 8.0), ("c", 1, 9.0)]
    for run, workers, value in runs:
        bars.append(path, {"case": "http", "run": run, "workers": workers, "value": value})

    def values(**of: object) -> list[float]:
        return [line["value"] for line in bars.latest(path, **of).get("http", [])]

    assert values() == values(workers=1) == [8.0, 9.0]
    assert values(workers=2, run="b") == [7.0]
    assert values(workers=3) == values(mps=True) == []
