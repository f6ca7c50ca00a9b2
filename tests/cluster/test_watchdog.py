"""A process that stands still is ended from outside; one that lives, or ends by itself, is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

LIMIT_S = 2.0

PARENT = """
import asyncio, sys, time
from lorafleet.cluster.watchdog import Watchdog
stuck = []
async def main():
    guard = Watchdog(lambda: bool(stuck), limit_s=%s)
    task = asyncio.create_task(guard.run())
    print(guard._child.pid, flush=True)
    await asyncio.sleep(0.5)
    %s
asyncio.run(main())
"""


@contextmanager
def parent(does: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A guarded process, and the id of its watchdog."""
    code = PARENT % (LIMIT_S, does)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def await_end(pid: int) -> None:
    deadline_s = time.monotonic() + 20
    while is_there(pid):
        assert time.monotonic() < deadline_s, "the watchdog is still there"
        time.sleep(0.02)


@pytest.mark.parametrize("does", ["time.sleep(600)", "stuck.append(1); await asyncio.sleep(600)"])
@pytest.mark.slow
def test_a_hang_ends_the_process(does: str) -> None:
    with parent(does) as (process, child):
        assert process.wait(20) == -signal.SIGKILL
        await_end(child)


@pytest.mark.slow
def test_a_stopped_process_is_ended_within_the_limit() -> None:
    with parent("await asyncio.sleep(600)") as (process, child):
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        assert process.wait(20) == -signal.SIGKILL
        assert time.monotonic() - began_s < LIMIT_S + 10
        await_end(child)


@pytest.mark.slow
def test_one_that_lives_goes_on_and_takes_its_watchdog_along() -> None:
    with parent("await asyncio.sleep(3 * 2.0)") as (process, child):
        assert process.wait(30) == 0
        await_end(child)


@pytest.mark.slow
def test_the_watchdog_goes_with_a_process_that_is_killed() -> None:
    with parent("await asyncio.sleep(600)") as (process, child):
        process.kill()
        process.wait(20)
        await_end(child)
