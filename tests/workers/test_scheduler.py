"""What the scheduler gives to whom, step by step."""

from __future__ import annotations

import pytest

from tests.workers.stepping import PAGE_TOKENS, Stepping


def test_a_prompt_is_cut_into_chunks_beside_decodes() -> None:
    run = Stepping(max_batch_tokens=8)
    short = run.add(3, max_tokens=6)
    assert run.step() == {short: 3}
    long = run.add(20)
    assert run.step() == {short: 1, long: 7}
    assert run.step() == {short: 1, long: 7}
    assert run.step() == {short: 1, long: 6}
    assert run.step() == {short: 1, long: 1}
    run.run()
    assert (short.num_made, long.num_made) == (6, 4)
    run.check()


def test_decodes_come_before_prefills() -> None:
    run = Stepping(max_batch_tokens=4)
    long = run.add(11)
    assert run.step() == {long: 4}
    decoding = [run.add(1, max_tokens=9) for _ in range(2)]
    assert run.step() == {long: 4}, "the chunk under way has the budget"
    assert run.step() == {long: 3, decoding[0]: 1}
    assert list(run.step()) == [long, decoding[0], decoding[1]]
    another = run.add(10)
    assert run.step() == {long: 1, decoding[0]: 1, decoding[1]: 1, another: 1}
    run.run()


def test_every_running_sequence_decodes_in_every_step() -> None:
    run = Stepping(max_batch_tokens=3, max_running=8)
    sequences = [run.add(1, max_tokens=5) for _ in range(8)]
    run.run()
    # Never more run than the budget has tokens for, so none waits between two of its tokens.
    for sequence in sequences:
        steps = [number for number, step in enumerate(run.steps) if sequence in step.counts]
        assert steps == list(range(steps[0], steps[0] + 5))


def test_beside_decodes_a_step_is_small_while_few_prompts_wait() -> None:
    run = Stepping(num_pages=20_000, max_batch_tokens=4000, max_running=64)
    decoding = run.add(1, max_tokens=99)
    run.step()
    few = [run.add(500, max_tokens=1) for _ in range(3)]
    assert run.step() == {decoding: 1, few[0]: 500, few[1]: 500, few[2]: 23}, "1,024 tokens in all"
    assert run.step() == {decoding: 1, few[2]: 477}
    for _ in range(17):
        run.add(600, max_tokens=1)
    assert [sum(run.step().values()) for _ in range(3)] == [4000, 1024, 1024], "10,200 wait, then 6,201"
    run.run()


def test_without_decodes_and_under_a_small_budget_a_step_is_full() -> None:
    run = Stepping(num_pages=20_000, max_batch_tokens=2000, max_running=3)
    run.add(5000, max_tokens=9)
    assert [sum(run.step().values()) for _ in range(3)] == [2000, 2000, 1000]
    for _ in range(9):
        run.add(1900, max_tokens=1)
    assert sum(run.step().values()) == 1024, "only two of them may run"
    run.run()
    narrow = Stepping(num_pages=20_000, max_batch_tokens=300)
    narrow.add(1, max_tokens=9)
    narrow.step()
    narrow.add(2000)
    assert sum(narrow.step().values()) == 300
    narrow.run()


def test_guesses_have_room_beside_a_prompt_that_fills_the_step() -> None:
    run = Stepping(num_pages=20_000, max_batch_tokens=8192)
    decoding = run.add(1, max_tokens=99)
    run.step()
    run.add(5000)
    rows = {item.sequence: item for item in run.scheduler.schedule({decoding: [5, 6, 7]})}
    assert rows[decoding].guess == [5, 6, 7]
    assert sum(item.num_rows for item in rows.values()) == 1024


def test_prompts_have_half_of_a_step_beside_many_decodes() -> None:
    run = Stepping(num_pages=20_000, max_batch_tokens=4000, max_running=800)
    for _ in range(700):
        run.add(1, max_tokens=9)
    run.step()
    prompt = run.add(3000, max_tokens=1)
    assert run.step()[prompt] == 700
    run.run()


def test_no_more_run_than_may() -> None:
    run = Stepping(max_running=3, max_batch_tokens=64)
    for _ in range(7):
        run.add(2)
    run.step()
    assert (run.scheduler.num_running, run.scheduler.num_waiting) == (3, 4)
    run.run()
    assert len(run.finished) == 7


def test_what_does_not_fit_is_looked_past() -> None:
    run = Stepping(num_pages=8, prefix_cache=False)
    running = run.add(14, max_tokens=8)
    run.step()
    large, small = run.add(20), run.add(3)
    assert run.step() == {running: 1, small: 3}
    assert list(run.live) == [running, small, large]


def test_an_overdue_one_is_not_passed_by_what_takes_its_pages() -> None:
    run = Stepping(num_pages=8, prefix_cache=False)
    running = run.add(14, max_tokens=8)
    run.step()
    large = run.add(20, max_tokens=1)
    run.clock.now_s = 1.9
    first = run.add(3, max_tokens=2)
    assert run.step() == {running: 1, first: 3}
    run.clock.now_s = 2.1
    second = run.add(3, max_tokens=2)
    while not large.is_admitted:
        assert second not in (counts := run.step()) or large in counts, "it takes what the overdue one waits for"
    run.run()
    assert [one.num_made for one in (running, large, first, second)] == [8, 1, 2, 2]


def test_an_overdue_adapter_is_not_starved_by_hot_ones() -> None:
    """Requests for two hot adapters come without end into a pool of two; a third adapter gets in all the same."""
    run = Stepping(capacity=2, max_running=4)
    hot = [run.add(2, max_tokens=6, version=version) for version in ("a", "b") for _ in range(2)]
    run.step()
    run.step()
    cold = run.add(2, version="cold")
    for number in range(200):
        run.clock.now_s += 0.1
        hot.append(run.add(2, max_tokens=6, version="ab"[number % 2]))
        run.step()
        run.check()
        if cold in run.finished:
            break
    assert cold in run.finished
    run.run()
    assert all(one in run.finished for one in hot)


def test_who_holds_a_lease_runs_behind_an_overdue_one() -> None:
    """Else the overdue one would wait for a lease that waits for it."""
    run = Stepping(num_pages=8, capacity=1, prefix_cache=False)
    base = run.add(14, max_tokens=8)
    first = run.add(2, max_tokens=1, version="a")
    run.step()
    run.step()
    assert first in run.finished
    leased = run.add(20, max_tokens=2, version="a")
    run.step()
    assert leased.lease is not None, "there is room for its adapter, but not for its prompt"
    blocked = run.add(2, max_tokens=2, version="b")
    run.scheduler._waiting.reverse()
    run.clock.now_s = 10.0
    late = run.add(2, max_tokens=2, version="a")
    while base not in run.finished:
        run.step()
    assert leased in run.step()
    assert late.lease is None, "no new lease on what the overdue one waits for"
    run.run()
    assert run.finished[-3:] == [leased, blocked, late]


def test_who_joins_an_adapter_that_is_coming_passes_an_overdue_one() -> None:
    """It takes no page, and what it joins is in use no longer for it."""
    run = Stepping(capacity=2)
    hot = run.add(2, max_tokens=12, version="hot")
    run.step()
    run.step()
    run.gate.is_loading_held_up = True
    first = run.add(2, max_tokens=4, version="a")
    run.step()
    overdue = run.add(2, version="b")
    run.clock.now_s = 10.0
    mate, late = run.add(2, max_tokens=4, version="a"), run.add(2, version="hot")
    run.step()
    assert mate.lease is not None
    assert late.lease is None, "the overdue one may get the pages of what is leased no further"
    run.gate.is_loading_held_up = False
    assert run.step() == {hot: 1, first: 2, mate: 2}
    later = run.add(2, version="a")
    while overdue.lease is None:
        assert later.lease is None, "what came is there now, and goes when those are done that it came for"
        run.step()
    assert mate in run.finished
    run.run()
    assert {late, later} <= set(run.finished)


def test_loading_holds_nobody_up() -> None:
    run = Stepping()
    run.gate.is_loading_held_up = True
    cold, base = run.add(2, version="cold"), run.add(2)
    run.clock.now_s = 100.0
    assert run.step() == {base: 2}
    run.gate.is_loading_held_up = False
    assert run.step() == {base: 1, cold: 2}


@pytest.mark.parametrize("lag", [False, True], ids=["synchronous", "step_in_flight"])
def test_the_last_admitted_is_preempted_and_resumes(lag: bool) -> None:
    run = Stepping(num_pages=6, prefix_cache=False, lag=lag, capacity=3)
    first = run.add(8, max_tokens=14, version="a")
    second = run.add(8, max_tokens=12, version="b")
    run.step()
    run.step()
    while second.num_preemptions == 0:
        assert first.num_preemptions == 0
        run.step()
        run.check()
    assert second.lease is not None, "it resumes on the version that it began with"
    assert not second.kv_pages
    assert run.live == [first, second]
    run.run()
    run.check()
    assert first.num_preemptions == 0
    assert [one.num_made for one in (first, second)] == [14, 12]
    assert [one.token_ids[one.num_prompt :] for one in (first, second)] == [
        [one.num_prompt + place for place in range(one.num_prompt, len(one.token_ids))] for one in (first, second)
    ]
    assert run.cache.counts.used == 0


def test_a_preempted_one_is_readmitted_first() -> None:
    run = Stepping(num_pages=6, prefix_cache=False, max_running=2)
    run.add(8, max_tokens=14)
    second = run.add(8, max_tokens=12)
    late = run.add(8)
    while second.num_preemptions == 0:
        run.step()
    assert list(run.scheduler)[-2:] == [second, late]
    run.run()


def test_a_prefix_is_shared_and_counted_once() -> None:
    run = Stepping()
    prompt = tuple(range(1, 18))
    first = run.add(0, prompt=prompt, max_tokens=2)
    run.run()
    again = run.add(0, prompt=prompt, max_tokens=2)
    other = run.add(0, prompt=prompt, version="a", max_tokens=2)
    run.step()
    assert run.step()[other] == len(prompt), "another version's keys and values are of no use"
    assert again.num_cached == 4 * PAGE_TOKENS
    assert first.num_cached == 0
    run.run()
    run.check()


def test_prompt_logprobs_cost_no_more_of_a_step_than_their_tokens() -> None:
    run = Stepping(max_batch_tokens=40)
    asking = run.add(30, prompt_logprobs=True)
    also = run.add(14, prompt_logprobs=True)
    assert run.step() == {asking: 30, also: 10}
    assert run.step() == {asking: 1, also: 4}
    run.run()


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    run = Stepping()
    prompt = tuple(range(1, 14))
    run.add(0, prompt=prompt)
    run.run()
    asking = run.add(0, prompt=prompt, prompt_logprobs=True)
    assert run.step() == {asking: 13}
    run.run()


def test_finishing_gives_back_pages_and_lease_wherever_it_is() -> None:
    run = Stepping(max_running=1)
    running, waiting = run.add(5, version="a"), run.add(5, version="a")
    run.step()
    run.step()
    assert running.is_admitted
    assert not waiting.is_admitted
    for sequence in (waiting, running):
        run.finish(sequence)
        run.check()
    assert run.gate.leases["a"] == 0
    assert not run.live


@pytest.mark.parametrize("lag", [False, True], ids=["synchronous", "step_in_flight"])
def test_no_step_is_for_a_sequence_that_is_complete(lag: bool) -> None:
    run = Stepping(lag=lag)
    sequence = run.add(3, max_tokens=4)
    run.run()
    assert sum(step.counts.get(sequence, 0) for step in run.steps) == 3 + 3
