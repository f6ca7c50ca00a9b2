"""Every case of benchmarks/tensor_parallel.py, with everything small and on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.slow
def test_every_case_leaves_its_lines(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """In bfloat16, in which two ranks round otherwise than one."""
    out = tmp_path / "lines.jsonl"
    arguments = ["--out", str(out), "--geometry", "tiny", "--cases", "collectives,check,8b", "--run", "now"]
    script("tensor_parallel").main(arguments)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    decodes = {f"decode_{kind}{count}" for kind in ("base", "lora") for count in (64, 1)}
    assert {line["case"] for line in lines} == {"collectives", "check_base", "check_lora", "start", "memory", *decodes}
    assert {line["size"] for line in lines if line["case"] == "memory"} == {1, 2}
    checks = [line for line in lines if line["case"].startswith("check")]
    assert all(0 < line["prompt_mean"] < 0.02 for line in checks)
    assert all(line["decode_mean"] < 0.02 for line in checks if "decode_mean" in line)
