"""Ports that no other run on this machine takes, and that no program gets by chance: they lie below those."""

from __future__ import annotations

import fcntl
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

FIRST, SPAN, NUM_SPANS, NUM_RUNS = 12_000, 300, 4, 16
"""A run has so many spans of so many ports."""


class Ports:
    """The ports of one run."""

    def __init__(self, run: int) -> None:
        first = FIRST + run * NUM_SPANS * SPAN
        self._spans = iter([range(start, start + SPAN) for start in range(first, first + NUM_SPANS * SPAN, SPAN)])
        self._ones = iter(next(self._spans))

    def span(self) -> range:
        """As many ports as Serve wants for a number of replicas that follow one another."""
        return next(self._spans)

    def one(self) -> int:
        """A port."""
        return next(self._ones)


@contextmanager
def ports_of_a_run() -> Iterator[Ports]:
    """Ports that are this run's until it ends. Raises OSError where too many runs go on."""
    with ExitStack() as stack:
        for run in itertools.count():
            if run == NUM_RUNS:
                raise OSError(f"{NUM_RUNS} runs go on here already; end one of them first")
            lock = stack.enter_context((Path(tempfile.gettempdir()) / f"chaos-{run}.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield Ports(run)
            return
