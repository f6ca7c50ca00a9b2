"""A clock for the logic that takes one as an argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Clock:
    """Stands still until a test moves it: `clock.now_s += 5.0`."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s
