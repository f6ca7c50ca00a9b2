"""`make fidelity` on a CPU: what it prints and records, what it refuses to pass, and that the engine keeps its bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMPARISONS = ["basic", "full", "full, one by one", "chunked"]


@pytest.fixture
def fidelity() -> Iterator[ModuleType]:
    """benchmarks/fidelity.py."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    import fidelity as module  # type: ignore[import-not-found]

    yield module
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_report_has_a_line_for_each_comparison(
    fidelity: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "SHORT", (5, 11))
    out = tmp_path / "fidelity.jsonl"
    assert fidelity.main(["--longest", "40", "--tokens", "6", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    head, *rows = printed.strip().splitlines()
    assert head.split("  ")[-1].strip() == "strings equal"
    assert [name for row in rows[::2] for name in COMPARISONS if row.startswith(name + "  ")] == COMPARISONS
    assert [row.split()[0] for row in rows[1::2]] == ["decode"] * len(COMPARISONS)
    lines = lines_of(out)
    assert [line["comparison"] for line in lines] == COMPARISONS
    for line in lines:
        for phase in ("prefill", "decode"):
            figures = line[phase]
            assert isinstance(figures, dict)
            assert 0 < figures["mean_of_mean"] < figures["mean_of_max"] <= figures["max_of_max"] < 1e-4
        assert line["strings_equal"] == line["strings"] == (14 if line["comparison"] == "basic" else 21)
        assert {"commit", "device", "torch", "transformers", "peft"} <= line.keys()


@pytest.mark.slow
def test_a_missed_bar_is_told(
    fidelity: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "SHORT", (5,))
    monkeypatch.setattr(fidelity, "BARS", {"float32": 1e-9})
    out = tmp_path / "fidelity.jsonl"
    assert fidelity.main(["--longest", "5", "--tokens", "2", "--out", str(out)]) == 1
    assert "missed: chunked: a logprob is " in capsys.readouterr().out
    assert all(line["missed"] for line in lines_of(out))


@pytest.mark.slow
def test_prompts_of_two_thousand_tokens(
    fidelity: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And 32 new ones each, for the base and an adapter on everything."""
    monkeypatch.setattr(fidelity, "ADAPTERS", {"everything": fidelity.ADAPTERS["everything"]})
    monkeypatch.setattr(fidelity, "LONG", (64, 2000))
    out = tmp_path / "fidelity.jsonl"
    assert fidelity.main(["--out", str(out)]) == 0, capsys.readouterr().out
    assert [line["strings"] for line in lines_of(out)] == [14, 18, 18, 18]
