"""The example of a worker of two processes does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_group_on_a_laptop_answers_with_the_base_and_two_adapters() -> None:
    result = subprocess.run(
        [sys.executable, "examples/group.py"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=240
    )
    first, second, *answers = result.stdout.splitlines()
    assert first.startswith("rank 0: process")
    assert second.startswith("rank 1: process")
    assert answers == ["The cat says meow.", "THE CAT SAYS MEOW.", "Arr, th' cat be sayin' meow, matey!"]
