"""Bounds how often an ingress wakes a worker's streams, so that its core and its proxy's keep up.

Ingress and proxy each spend 0.1 to 0.3 ms of CPU on an event. If the workers' steps leave them that time, each token is
an event. If not, streams are woken less often, and one event has the tokens of several steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Protocol

SHARE = 0.7
"""Of one core that the events of an ingress may take: the rest is for beginning requests, and against queueing."""
MAX_GAP_S = 0.05
"""The longest that a stream's next token is kept for those that follow it."""
EVENT_S = 0.00025
"""CPU that an event takes, before it was measured."""
MEASURED_EVENTS = 512
MEASURED_S = 1.0
"""Update only if this many events arrive within this time. With fewer, the process's idle work would count."""


class Sleeper(Protocol):
    """A stream with something in it."""

    def wake(self) -> None:
        """Let its reader take what is there."""
        ...


class Pace:
    """Measures the CPU time of an event in this process. A proxy only passes events on and spends no more."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        self.clock = clock
        self.event_s = EVENT_S
        """CPU seconds an event, the beginning of requests included."""
        self._cpu_clock = cpu_clock
        self._num_events = 0
        self._began_s = clock()
        self._began_cpu_s = cpu_clock()

    def note_event(self) -> None:
        """A stream was read."""
        self._num_events += 1
        if self._num_events < MEASURED_EVENTS:
            return
        now, cpu_s = self.clock(), self._cpu_clock()
        if now - self._began_s <= MEASURED_S:
            self.event_s += ((cpu_s - self._began_cpu_s) / self._num_events - self.event_s) / 2
        self._num_events, self._began_s, self._began_cpu_s = 0, now, cpu_s

    def gap_s(self, num_streams: int) -> float:
        """Seconds between two events of each of so many streams."""
        return min(MAX_GAP_S, num_streams * self.event_s / SHARE)


class Turns:
    """Wakes the streams of one worker together, no more often than the pace says. One event loop uses it."""

    def __init__(self, pace: Pace, num_streams: Callable[[], int]) -> None:
        """num_streams: how many this process has now, on whatever worker."""
        self._pace = pace
        self._num_streams = num_streams
        self._waiting: dict[Sleeper, None] = {}
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, streams: Iterable[Sleeper]) -> None:
        """Wake them at the next turn, which may be now."""
        self._waiting.update(dict.fromkeys(streams))
        if self._timer is not None:
            return
        wait_s = self._due_s - self._pace.clock()
        if wait_s <= 0:
            self.end()
        else:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.end)

    def end(self) -> None:
        """Wake all that wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, {}
        for stream in waiting:
            stream.wake()
        self._due_s = self._pace.clock() + self._pace.gap_s(self._num_streams())
