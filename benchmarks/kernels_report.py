"""Holds the results of `csgmv.py` against the bars for the kernels on an H200, and draws them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

from bars import Bar, at_least, at_most, print_bars, read

Row = dict[str, Any]
SGLANG = ("sglang16", "sglang128")
PEERS = (*SGLANG, "vllm")
LARGE_US = 10.0
"""Floors from here on are of cases whose bytes matter more than their launches."""


def report(path: Path) -> None:
    """Print means, bars and the worst cases; draw every case."""
    rows = read_rows(path)
    linear = [row for row in rows if row["module"] != "embedding"]
    _line("all", linear)
    for phase in ("decode", "prefill"):
        _line(phase, [row for row in linear if row["batch"].startswith(phase)])
    for model, rank in _panels(linear):
        _line(f"{model} rank {rank}", [row for row in linear if (row["model"], row["rank"]) == (model, rank)])
    for row in rows:
        if row["module"] == "embedding":
            names = ("ours", "gather", *SGLANG, "ours_with_b")
            print(f"embedding rank {row['rank']} {row['batch']}: { ({n: round(us(row, n), 2) for n in names}) }")
    print(f"furthest over a floor of {LARGE_US:g} us or more:")
    for row in sorted(_large(linear), key=lambda row: -us(row, "ours") / row["floor_us"])[:8]:
        print(
            f"   {title(row)} {us(row, 'ours'):.1f} / {row['floor_us']:.1f} = {us(row, 'ours') / row['floor_us']:.2f}"
        )
    for row in _slower(linear):
        print(f"slower than the better peer: {title(row)} {us(row, 'ours'):.1f}, {us(row, *PEERS):.1f}")
    for row in rows:
        for name in row:
            if name.endswith(("_failure", "_wrong")):
                print(f"{name} of {title(row)}: {row[name]}")
    print()
    print_bars(kernel_bars(rows))
    _draw(linear, path.with_suffix(".png"))


def read_rows(path: Path) -> list[Row]:
    """The last line of each case, in the order of the first."""
    rows: dict[tuple[str, ...], Row] = {}
    for row in read(path):
        rows[tuple(row[name] for name in ("model", "module", "rank", "batch"))] = row
    return list(rows.values())


def us(row: Row, *names: str) -> float:
    """The least median of these, NaN where none was measured."""
    return min((row[f"{name}_us"][1] for name in names if f"{name}_us" in row), default=nan)


def title(row: Row) -> str:
    return f"{row['model']} rank {row['rank']} {row['module']} {row['batch']}"


def kernel_bars(rows: Sequence[Row]) -> Iterator[Bar]:
    """The bars, of all cases that there are."""
    linear = [row for row in rows if row["module"] != "embedding"]
    failed = [row for row in rows if any(name in row for name in ("ours_failure", "ours_wrong"))]
    yield at_most("cases that failed or were wrong", len(failed) if rows else None, 0)
    over_floor = "times the floor, mean over cases with a floor of 10 us or more"
    yield at_most(over_floor, _mean(us(row, "ours") / row["floor_us"] for row in _large(linear)), 1.6)
    yield at_least("times faster than SGLang's best chunk, mean over all cases", _speedup(linear, SGLANG), 3.0)
    yield at_least("times faster than the better of both peers, mean", _speedup(linear, PEERS), 2.0)
    has_peers = any(not isnan(us(row, *PEERS)) for row in linear)
    yield at_most("cases slower than the better peer", len(_slower(linear)) if has_peers else None, 0)
    tiny = [us(row, "ours") for row in linear if row["floor_us"] < 1 and not isnan(us(row, "ours"))]
    yield at_most("us where the floor is under 1 us, the most", max(tiny, default=None), 10.0)
    yield at_most("mixed ranks over their own floor, of rank 64's over its", _mixed(linear), 1.25)
    lookups = [us(row, "ours") / us(row, "gather") for row in rows if row["module"] == "embedding"]
    yield at_most("embedding, of a plain gather's time, the most", max(lookups, default=None), 1.0)


def _mean(ratios: Iterable[float]) -> float | None:
    known = [ratio for ratio in ratios if not isnan(ratio)]
    return statistics.geometric_mean(known) if known else None


def _large(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["floor_us"] >= LARGE_US and not isnan(us(row, "ours"))]


def _speedup(rows: Sequence[Row], names: tuple[str, ...]) -> float | None:
    return _mean(us(row, *names) / us(row, "ours") for row in rows)


def _slower(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if us(row, *PEERS) < us(row, "ours")]


def _mixed(rows: Sequence[Row]) -> float | None:
    """A batch of ranks 8 to 64 against one of rank 64 alone, each over the bytes that it must move."""
    over = {(r["rank"], r["model"], r["module"], r["batch"]): us(r, "ours") / r["floor_us"] for r in _large(rows)}
    return _mean(over[key] / over["64", *key[1:]] for key in over if key[0] == "8-64" and ("64", *key[1:]) in over)


def _panels(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["model"], row["rank"]) for row in rows))


def _line(name: str, rows: Sequence[Row]) -> None:
    text = f"{name:32} {len(rows):4} cases"
    large = _large(rows)
    if large:
        text += f"; {_mean(us(row, 'ours') / row['floor_us'] for row in large):.2f} times the floor"
        text += f" ({len(large)} of {LARGE_US:g} us or more)"
    for peer, names in {"SGLang's best": SGLANG, "vLLM": ("vllm",), "the better": PEERS}.items():
        speedup = _speedup(rows, names)
        if speedup is not None:
            text += f"; {speedup:.2f} x {peer}"
    print(text)


def _draw(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot  # the machine that measures need not have it

    panels = _panels(rows)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(7 * columns, 7.2 * lines), squeeze=False)
    marks = {
        "floor": ("_", "black"),
        "ours": ("o", "tab:green"),
        "sglang16": ("^", "tab:orange"),
        "sglang128": ("v", "tab:red"),
        "vllm": ("s", "tab:blue"),
    }
    for axis, (model, rank) in zip(axes.flat, panels, strict=False):
        cases = [row for row in rows if (row["model"], row["rank"]) == (model, rank)]
        for name, (mark, color) in marks.items():
            points = [row["floor_us"] if name == "floor" else us(row, name) for row in cases]
            if not all(map(isnan, points)):
                size = 9 if name == "floor" else 5
                axis.plot(range(len(cases)), points, mark, color=color, label=name, markersize=size)
        axis.set_yscale("log")
        axis.set_title(f"{model}, rank {rank}")
        axis.set_ylabel("us a layer, shrink and expand")
        ticks = [f"{row['module']} {row['batch']}" for row in cases]
        axis.set_xticks(range(len(cases)), ticks, rotation=90, fontsize=6)
        axis.grid(axis="y", alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    axes.flat[0].legend()
    figure.suptitle(f"csgmv on {rows[0]['gpu']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=70)
    pyplot.close(figure)
