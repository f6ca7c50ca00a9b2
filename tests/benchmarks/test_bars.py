"""What the scripts of `benchmarks/` say of where their figures are from."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


def test_a_machine_without_git_measures_too(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = script("bars")
    monkeypatch.setenv("PATH", "")
    assert bars.commit() == "unknown"
    assert bars.cpu_name()
