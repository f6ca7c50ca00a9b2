"""Work on a few threads: callers take turns, and who leaves is not worked for."""

from __future__ import annotations

import asyncio
import threading

import pytest

from lorafleet.cluster.serving.fair_threads import FairThreads
from tests.support.wait import until


async def test_callers_take_turns() -> None:
    threads = FairThreads(1, "t")
    done: list[object] = []
    go = threading.Event()
    first = asyncio.create_task(threads.run("greedy", go.wait, 20))
    await asyncio.sleep(0)
    greedy = [asyncio.create_task(threads.run("greedy", done.append, f"greedy {i}")) for i in range(4)]
    modest = [asyncio.create_task(threads.run("modest", done.append, f"modest {i}")) for i in range(2)]
    await asyncio.sleep(0.01)
    assert done == []
    go.set()
    await asyncio.gather(first, *greedy, *modest)
    assert done == ["greedy 0", "modest 0", "greedy 1", "modest 1", "greedy 2", "greedy 3"]


async def test_who_leaves_while_waiting_is_not_worked_for_and_frees_no_more_than_there_is() -> None:
    threads = FairThreads(2, "t")
    done: list[object] = []
    go = threading.Event()
    busy = [asyncio.create_task(threads.run("a", go.wait, 20)) for _ in range(2)]
    waiting = [asyncio.create_task(threads.run("a", done.append, i)) for i in range(3)]
    await asyncio.sleep(0.01)
    waiting[1].cancel()
    busy[0].cancel()  # its thread works on
    await asyncio.sleep(0.01)
    assert done == []
    go.set()
    await asyncio.gather(*busy, *waiting, return_exceptions=True)
    await until(lambda: threads._num_free == 2)
    assert done == [0, 2]


async def test_errors_come_back() -> None:
    threads = FairThreads(1, "t")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await threads.run("a", lambda: 1 / 0)
    assert await threads.run("a", lambda: 5) == 5
