"""When streams are woken, by a clock that is passed in."""

from __future__ import annotations

import asyncio

import pytest

from lorafleet.cluster.worker.pace import EVENT_S, MAX_GAP_S, MEASURED_EVENTS, MEASURED_S, SHARE, Pace, Turns


class Stream:
    def __init__(self) -> None:
        self.num_woken = 0

    def wake(self) -> None:
        self.num_woken += 1


def measured(*, wall_s: float, cpu_s: float) -> Pace:
    """A pace that has measured once."""
    now, cpu = 0.0, 0.0
    pace = Pace(clock=lambda: now, cpu_clock=lambda: cpu)
    now, cpu = wall_s, cpu_s
    for _ in range(MEASURED_EVENTS):
        pace.note_event()
    return pace


def test_the_gap_is_what_the_events_of_all_streams_cost() -> None:
    pace = Pace()
    assert pace.gap_s(0) == 0
    assert pace.gap_s(16) == pytest.approx(16 * EVENT_S / SHARE)
    assert pace.gap_s(10_000) == MAX_GAP_S


def test_the_cost_of_an_event_is_measured_under_load_alone() -> None:
    assert measured(wall_s=MEASURED_S / 2, cpu_s=MEASURED_EVENTS * 0.0001).event_s == pytest.approx(0.000175)
    assert measured(wall_s=MEASURED_S * 2, cpu_s=MEASURED_EVENTS * 0.0001).event_s == EVENT_S


async def test_what_comes_before_its_turn_waits_for_it_and_no_longer() -> None:
    now = 1.0
    turns = Turns(Pace(clock=lambda: now), lambda: 20)
    one, two = Stream(), Stream()
    turns.add([one])
    assert one.num_woken == 1, "nothing came for long"
    turns.add([one])
    turns.add([one, two])
    assert (one.num_woken, two.num_woken) == (1, 0)
    await asyncio.sleep(2 * Pace().gap_s(20))
    assert (one.num_woken, two.num_woken) == (2, 1)
    now += MAX_GAP_S
    turns.add([one])
    assert one.num_woken == 3


async def test_steps_that_leave_time_for_their_events_are_not_held_back() -> None:
    now = 0.0
    turns = Turns(Pace(clock=lambda: now), lambda: 16)
    stream = Stream()
    for step in range(10):
        now = step * 0.01
        turns.add([stream])
        assert stream.num_woken == step + 1


async def test_the_end_wakes_all_that_wait() -> None:
    turns = Turns(Pace(), lambda: 1000)
    one, two = Stream(), Stream()
    turns.add([one])
    turns.add([one, two])
    turns.end()
    assert (one.num_woken, two.num_woken) == (2, 1)
