"""Who gets which worker, who waits and who is refused: the queue without any worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from lorafleet.cluster.errors import NoWorker, Overloaded
from lorafleet.cluster.routing.placement import Placement
from lorafleet.cluster.routing.worker_queue import LOST_S, Waiter, WorkerQueue
from lorafleet.cluster.wire import VERSION_PREFIX, RoutingReport

MINE, THEIRS = "a" * 32, "b" * 32
SHOUT = "aa" * 20


def queue_of(
    workers: Iterable[str], *, max_load: int = 2, max_queued: int = 3, clock: Callable[[], float] = lambda: 0.0
) -> WorkerQueue:
    placement = Placement(max_load=max_load, spill_gap=8, memory_s=5.0)
    queue = WorkerQueue(placement, max_queued=max_queued, ingress_id=MINE, clock=clock)
    queue.update({worker_id: report() for worker_id in workers})
    return queue


def report(*answering: tuple[str, int], resident: Iterable[str] = ()) -> RoutingReport:
    return RoutingReport(tuple(version[:VERSION_PREFIX] for version in resident), 10, answering)


class Request:
    """One that wants a worker, and what came of it."""

    def __init__(
        self, queue: WorkerQueue, version: str | None = None, *, excluded: Iterable[str] = (), resident: bool = False
    ) -> None:
        self.worker_id = ""
        self.error: Exception | None = None
        self.waiter = Waiter(version, frozenset(excluded), resident, place=self._place, fail=self._fail)
        queue.add(self.waiter)

    def _place(self, worker_id: str) -> None:
        assert not self.worker_id
        assert self.error is None
        self.worker_id = worker_id

    def _fail(self, error: Exception) -> None:
        assert not self.worker_id
        self.error = error


def test_a_request_goes_where_its_adapter_is() -> None:
    queue = queue_of((), max_load=10)
    queue.update({"w0": report(), "w1": report(resident=[SHOUT])})
    assert [Request(queue, SHOUT).worker_id for _ in range(3)] == ["w1"] * 3


def test_those_that_find_all_full_wait_in_order_and_beyond_the_bound_are_refused() -> None:
    queue = queue_of(["w0"], max_load=1, max_queued=2)
    Request(queue)
    waiting = [Request(queue) for _ in range(2)]
    with pytest.raises(Overloaded) as caught:
        Request(queue)
    assert caught.value.retry_after_s
    queue.release("w0")
    assert [request.worker_id for request in waiting] == ["w0", ""]
    queue.release("w0")
    assert [request.worker_id for request in waiting] == ["w0", "w0"]


def test_a_bound_of_none_lets_through_what_finds_room() -> None:
    queue = queue_of(["w0"], max_load=1, max_queued=0)
    assert Request(queue).worker_id == "w0"
    with pytest.raises(Overloaded):
        Request(queue)
    queue.release("w0")
    assert Request(queue).worker_id == "w0"


def test_who_can_only_be_served_where_its_adapter_is_waits_there_and_holds_up_nobody() -> None:
    queue = queue_of((), max_load=1)
    queue.update({"w0": report(), "w1": report(resident=[SHOUT])})
    assert Request(queue, SHOUT, resident=True).worker_id == "w1"
    waiting, other = Request(queue, SHOUT, resident=True), Request(queue)
    assert [waiting.worker_id, other.worker_id] == ["", "w0"]
    queue.release("w1")
    assert [waiting.worker_id, other.worker_id] == ["w1", "w0"]


def test_one_that_waits_for_another_worker_does_not_hold_up_those_behind() -> None:
    queue = queue_of(["w0", "w1"], max_load=1)
    assert sorted(Request(queue).worker_id for _ in range(2)) == ["w0", "w1"]
    picky, other = Request(queue, excluded=["w0"]), Request(queue)
    queue.release("w0")
    assert [picky.worker_id, other.worker_id] == ["", "w0"]
    queue.release("w1")
    assert [picky.worker_id, other.worker_id] == ["w1", "w0"]


def test_one_that_leaves_lets_the_next_go_first() -> None:
    queue = queue_of(["w0"], max_load=1)
    Request(queue)
    left, other = Request(queue), Request(queue)
    for _ in range(2):
        queue.remove(left.waiter)
    queue.release("w0")
    assert [left.worker_id, other.worker_id] == ["", "w0"]


def test_excluded_workers_are_avoided_while_there_are_others() -> None:
    queue = queue_of(["w0", "w1"], max_load=100)
    queue.update({"w0": report(resident=[SHOUT]), "w1": report()})
    assert {Request(queue, SHOUT, excluded=["w0"]).worker_id for _ in range(8)} == {"w1"}
    queue.update({"w0": report()})
    assert Request(queue, SHOUT, excluded=["w0"]).worker_id == "w0"


def test_a_worker_that_was_just_lost_is_avoided_for_a_while() -> None:
    now_s = 0.0
    queue = queue_of(["w0", "w1"], max_load=100, clock=lambda: now_s)
    queue.avoid("w0")
    assert {Request(queue).worker_id for _ in range(8)} == {"w1"}
    assert Request(queue, excluded=["w1"]).worker_id == "w0", "there is no other"
    now_s = LOST_S + 0.1
    assert {Request(queue).worker_id for _ in range(4)} == {"w0"}, "it has less to do"


def test_what_a_worker_holds_is_remembered_while_it_is_not_heard_of() -> None:
    """Serve's controller may be away, and then say all anew."""
    queue = queue_of(["w0"], max_load=2)
    for _ in range(2):
        Request(queue)
    queue.update({})
    waiting = Request(queue)
    assert queue.is_stuck
    queue.update({"w0": report()})
    assert not waiting.worker_id
    assert not queue.is_stuck
    queue.release("w0")
    assert waiting.worker_id == "w0"


def test_waiters_start_as_soon_as_a_worker_comes_or_learn_that_there_will_be_none() -> None:
    queue = queue_of(())
    one = Request(queue)
    queue.update({"w0": report()})
    assert one.worker_id == "w0"
    queue.update({})
    two = Request(queue)
    queue.refuse(NoWorker("none"))
    assert isinstance(two.error, NoWorker)
    queue.update({"w0": report()})
    assert not two.worker_id


def test_what_other_ingresses_sent_counts_and_ones_own_does_not_count_twice() -> None:
    queue = queue_of((), max_load=40)
    queue.update({"w0": report(), "w1": report((THEIRS, 20))})
    assert {Request(queue).worker_id for _ in range(10)} == {"w0"}
    queue.update({"w0": report((MINE, 10), (THEIRS, 20)), "w1": report((THEIRS, 15))})
    assert Request(queue).worker_id == "w1"
    queue.update({"w0": report((MINE, 10)), "w1": report((MINE, 1), (THEIRS, 30))})
    assert Request(queue).worker_id == "w0"
