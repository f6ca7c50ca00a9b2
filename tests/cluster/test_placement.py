"""Where requests go: residency first, load second, and never all of a hot adapter to one worker."""

from __future__ import annotations

import heapq
import random
from collections import Counter

import numpy as np
import pytest

from lorafleet.cluster.routing.placement import MAX_REMEMBERED, Candidate, Placement
from lorafleet.cluster.wire import VERSION_PREFIX

SHOUT, WHISPER = "aa" * 32, "bb" * 32


def prefix(*versions: str) -> frozenset[str]:
    return frozenset(version[:VERSION_PREFIX] for version in versions)


def make(*, max_load: int = 128, spill_gap: int = 8, memory_s: float = 5.0, seed: int = 0) -> Placement:
    return Placement(max_load=max_load, spill_gap=spill_gap, memory_s=memory_s, rng=random.Random(seed))


class Workers:
    """Workers that keep what they are sent, and report residency only when told to."""

    def __init__(self, placement: Placement, *worker_ids: str) -> None:
        self.placement = placement
        self.loads = Counter(dict.fromkeys(worker_ids, 0))
        self.resident: dict[str, frozenset[str]] = dict.fromkeys(worker_ids, frozenset())

    def send(self, version: str | None, now_s: float = 0.0) -> str | None:
        candidates = [Candidate(w, load, self.resident[w]) for w, load in self.loads.items()]
        worker_id = self.placement.choose(version, candidates, now_s)
        if worker_id is not None:
            self.loads[worker_id] += 1
        return worker_id


def test_goes_where_the_adapter_is_resident() -> None:
    placement = make()
    candidates = [Candidate("w0", held=3, resident=prefix(SHOUT)), Candidate("w1", held=0)]
    assert {placement.choose(SHOUT, candidates, now_s=i) for i in range(20)} == {"w0"}
    assert placement.choose(WHISPER, candidates, 0.0) == "w1"


def test_takes_the_less_loaded_of_two_residents() -> None:
    candidates = [Candidate(f"w{i}", held=i, resident=prefix(SHOUT)) for i in range(3)]
    chosen = Counter(make(seed=seed).choose(SHOUT, candidates, 0.0) for seed in range(300))
    # Of three pairs w0 wins two, w1 one, w2 none.
    assert chosen["w0"] == pytest.approx(200, abs=40)
    assert chosen["w1"] == pytest.approx(100, abs=40)
    assert chosen["w2"] == 0


def test_while_nobody_can_fetch_it_goes_only_where_it_is() -> None:
    placement = make(max_load=40, spill_gap=8)
    held, lacking = Candidate("w0", held=39, resident=prefix(SHOUT)), Candidate("w1", held=0)
    assert placement.choose(SHOUT, [held, lacking], 0.0) == "w1"
    assert placement.choose(SHOUT, [held, lacking], 0.0, only_resident=True) == "w0"
    full = Candidate("w0", held=40, resident=prefix(SHOUT))
    assert placement.choose(SHOUT, [full, lacking], 0.0, only_resident=True) is None
    assert placement.choose(WHISPER, [full, lacking], 0.0, only_resident=True) == "w1"
    assert placement.choose(None, [full, lacking], 0.0, only_resident=True) == "w1"


def test_stays_put_until_the_gap_and_then_spreads() -> None:
    workers = Workers(make(spill_gap=8), "w0", "w1")
    sent = [workers.send(SHOUT) for _ in range(60)]
    first = sent[0]
    assert sent[:9] == [first] * 9
    assert sent[9] != first
    assert abs(workers.loads["w0"] - workers.loads["w1"]) <= 9


@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_no_worker_gets_all_of_a_hot_adapter(num_workers: int) -> None:
    workers = Workers(make(), *(f"w{i}" for i in range(num_workers)))
    for _ in range(400):
        workers.send(SHOUT)
    assert max(workers.loads.values()) <= 400 / num_workers + 2 * 8


def test_one_request_at_a_time_warms_only_one_worker() -> None:
    workers = Workers(make(), "w0", "w1", "w2")
    for i in range(50):
        worker_id = workers.send(SHOUT, now_s=i / 10)
        assert worker_id is not None
        workers.loads[worker_id] -= 1
    assert len(workers.placement._sent[SHOUT[:VERSION_PREFIX]]) == 1


def test_what_was_sent_counts_as_resident_for_a_while_only() -> None:
    placement = make(memory_s=5.0)
    assert placement.choose(SHOUT, [Candidate("w0", 0), Candidate("w1", 1)], 0.0) == "w0"
    busier_now = [Candidate("w0", 3), Candidate("w1", 0)]
    assert placement.choose(SHOUT, busier_now, 5.0) == "w0"
    assert placement.choose(SHOUT, busier_now, 10.1) == "w1"


def test_a_dead_worker_is_forgotten() -> None:
    placement = make()
    assert placement.choose(SHOUT, [Candidate("w0", 0), Candidate("w1", 1)], 0.0) == "w0"
    placement.forget("w0")
    assert placement.choose(SHOUT, [Candidate("w0", 1), Candidate("w1", 0)], 0.1) == "w1"


def test_full_workers_are_passed_over_and_all_full_means_nobody() -> None:
    placement = make(max_load=4)
    full = Candidate("w0", 4, prefix(SHOUT))
    assert placement.choose(SHOUT, [full, Candidate("w1", 3)], 0.0) == "w1"
    assert placement.choose(SHOUT, [full, Candidate("w1", 4)], 0.0) is None
    assert placement.choose(None, [], 0.0) is None


def test_cold_adapters_and_the_base_prefer_free_pages_at_equal_load() -> None:
    candidates = [Candidate("w0", 2, free_pages=1), Candidate("w1", 2, free_pages=9)]
    assert {make(seed=seed).choose(SHOUT, candidates, 0.0) for seed in range(10)} == {"w1"}
    assert {make(seed=seed).choose(None, candidates, 0.0) for seed in range(10)} == {"w1"}


def test_base_requests_balance_and_leave_no_memory() -> None:
    workers = Workers(make(), "w0", "w1")
    for _ in range(101):
        workers.send(None)
    assert abs(workers.loads["w0"] - workers.loads["w1"]) <= 1
    assert workers.placement._sent == {}


def test_memory_is_bounded() -> None:
    workers = Workers(make(max_load=10**9), "w0", "w1")
    for i in range(MAX_REMEMBERED + 100):
        workers.send(f"{i:016x}" * 4, now_s=0.0)
    assert len(workers.placement._sent) == MAX_REMEMBERED


def test_requests_of_other_routers_count_and_do_not_count_as_room_taken() -> None:
    busy, free = Candidate("w0", held=0, others=30), Candidate("w1", held=5)
    assert make().choose(None, [busy, free], 0.0) == "w1"
    spilled = Candidate("w0", held=1, resident=prefix(SHOUT), others=30), Candidate("w1", held=5)
    assert make(spill_gap=8).choose(SHOUT, spilled, 0.0) == "w1"
    assert make(max_load=2).choose(None, [Candidate("w0", held=1, others=30)], 0.0) == "w0"
    assert make(max_load=2).choose(None, [Candidate("w0", held=2)], 0.0) is None


def test_routers_that_read_the_same_old_reports_do_not_all_send_to_one_worker() -> None:
    """Eight routers, eight workers, 512 requests that each end after some two reports and come again."""
    num, clients, rng = 8, 512, random.Random(0)
    routers = [make(max_load=10**6, seed=seed) for seed in range(num)]
    held = np.zeros((num, num), int)
    """[router, worker]"""
    reported, most, next_report_s = held.copy(), 0, 0.0
    ends: list[tuple[float, int, int]] = [(rng.random() * 0.1, client % num, -1) for client in range(clients)]
    heapq.heapify(ends)
    for _ in range(6 * clients):
        now_s, router, worker = heapq.heappop(ends)
        if now_s > next_report_s:
            reported, next_report_s = held.copy(), now_s + 1.0
        if worker >= 0:
            held[router, worker] -= 1
        others = reported.sum(axis=0) - reported[router]
        candidates = [Candidate(str(w), held[router, w], others=others[w], num_routers=num) for w in range(num)]
        worker = int(routers[router].choose(None, candidates, now_s) or 0)
        held[router, worker] += 1
        most = max(most, int(held.sum(axis=0).max()))
        heapq.heappush(ends, (now_s + 1.9 * rng.uniform(0.97, 1.03), router, worker))
    assert most < 1.3 * clients / num
