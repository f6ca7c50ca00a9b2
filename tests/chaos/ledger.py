"""What a run has measured: each result is written down at once, and the tables are printed at the end."""

from __future__ import annotations

import fcntl
import json
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.chaos.table import HEAD, HOSTILE_HEAD, hostile_rows, rows, text


class Ledger:
    """Results and what was missed. Several runs may write to one file."""

    def __init__(self, out: Path | None = None) -> None:
        self._out = out
        self.results: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def note(self, result: dict[str, Any]) -> None:
        """Print a result, and append it to the file."""
        self.results.append(result)
        line = json.dumps(result)
        print(line, flush=True)
        if self._out is not None:
            with self._out.open("a") as out:
                fcntl.flock(out, fcntl.LOCK_EX)
                out.write(line + "\n")

    def miss(self, problems: Iterable[str]) -> None:
        """Print what must not have happened."""
        for problem in problems:
            self.problems.append(problem)
            print(f"MISSED {problem}", file=sys.stderr, flush=True)

    def close(self) -> int:
        """Print the tables and all that was missed; return the exit status."""
        print(text(HEAD, rows([result for result in self.results if "fault" in result])))
        if sieges := [result for result in self.results if "hostile" in result]:
            print(text(HOSTILE_HEAD, hostile_rows(sieges)))
        for problem in self.problems:
            print(f"MISSED {problem}", file=sys.stderr)
        return int(bool(self.problems))


class Budget:
    """Time that a run may take. SIGINT or SIGTERM ends it after the trial under way; a second one ends that, too."""

    def __init__(self, seconds: float | None = None) -> None:
        self._ends_s = None if seconds is None else time.monotonic() + seconds
        self._is_ended = False
        self._longest_s: defaultdict[str, float] = defaultdict(float)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)

    def has_room(self, trial: str) -> bool:
        """Return True if such a trial, as long as the longest one so far, is over in time."""
        if self._is_ended:
            return False
        return self._ends_s is None or time.monotonic() + self._longest_s[trial] < self._ends_s

    def took(self, trial: str, seconds: float) -> None:
        """Remember how long a trial was."""
        self._longest_s[trial] = max(self._longest_s[trial], seconds)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._is_ended:
            raise KeyboardInterrupt
        self._is_ended = True
        print("ending after the trial under way", file=sys.stderr, flush=True)
