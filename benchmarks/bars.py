"""Results as lines of JSON: what they are of, and the bars that they are held against."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and what it must be."""

    name: str
    value: float | None
    """None: not measured."""
    bound: float
    is_most: bool
    """The bound is the most that the value may be; else the least."""

    @property
    def verdict(self) -> str:
        """`holds`, `misses` or `unseen`."""
        if self.value is None:
            return "unseen"
        return "holds" if (self.value <= self.bound if self.is_most else self.value >= self.bound) else "misses"


def at_most(name: str, value: float | None, bound: float) -> Bar:
    """A bar that is held from below."""
    return Bar(name, value, bound, is_most=True)


def at_least(name: str, value: float | None, bound: float) -> Bar:
    """A bar that is held from above."""
    return Bar(name, value, bound, is_most=False)


def ratio(value: float | None, other: float | None) -> float | None:
    """None if either is not known."""
    return None if value is None or other is None else value / other


def number(value: float) -> str:
    """With three digits, or all of those before the point."""
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def print_bars(bars: Iterable[Bar]) -> None:
    """A line a bar."""
    for bar in bars:
        value = "-" if bar.value is None else number(bar.value)
        print(f"{bar.verdict:7} {bar.name:82} {value:>9}   {'<=' if bar.is_most else '>='} {bar.bound:,g}")


def append(path: Path, line: Line) -> None:
    """One more line, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(line) + "\n")


def read(path: Path, **of: object) -> list[dict[str, Any]]:
    """The lines that say what `of` does."""
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if all(line.get(name) == value for name, value in of.items())]


def latest(path: Path, **of: object) -> dict[str, list[dict[str, Any]]]:
    """Case -> its lines in the last run that has any; only lines that say what `of` does."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read(path, **of):
        before = found.get(line["case"])
        if before and before[0].get("run") == line.get("run") is not None:
            before.append(line)
        else:
            found[line["case"]] = [line]
    return found


def median(lines: Iterable[Line] | None, name: str) -> float | None:
    """Of a figure over a case's lines; None where no line has it."""
    values = [line[name] for line in lines or () if name in line]
    return statistics.median(values) if values else None


def commit() -> str:
    """Return the commit that is checked out."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # a machine with a GPU need not have git
        found = ""
    return found or "unknown"


def cpu_name() -> str:
    """The processor that this runs on."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
