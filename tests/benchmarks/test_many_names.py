"""The benchmark of many names runs, and has a figure for each of its bars."""

from __future__ import annotations

from pathlib import Path

from benchmarks import many_names


async def test_every_bar_has_a_figure(tmp_path: Path) -> None:
    figures = await many_names.measure(60, tmp_path, minutes=0.03)
    assert figures.keys() >= {*many_names.BARS, "stall_live_s"}
    assert all(figure >= 0 for figure in figures.values())
