"""How many tokens steps get, by what decodes and what waits."""

from __future__ import annotations

import pytest

from lorafleet.workers.step_budget import GROWS_AFTER, GROWTH, SMALL_STEP, StepBudget


@pytest.mark.parametrize(
    ("num_decodes", "num_prompt_tokens", "expected"),
    [
        (0, 1, 8192),
        (0, 100_000, 8192),
        (1, 0, SMALL_STEP),
        (64, 2000, SMALL_STEP),
        (64, 16_383, SMALL_STEP),
        (64, 16_384, 8192),
        (700, 5000, 1400),
        (5000, 5000, 8192),
    ],
)
def test_the_first_step(num_decodes: int, num_prompt_tokens: int, expected: int) -> None:
    assert StepBudget(8192).next_step(num_decodes, num_prompt_tokens) == expected


def test_no_step_has_more_than_it_may() -> None:
    budget = StepBudget(300)
    assert {budget.next_step(num_decodes, 500) for num_decodes in (0, 1, 200)} == {300}


def play(budget: StepBudget, num_decodes: int, left: int) -> tuple[int, int]:
    """A step of decodes and of the prompt tokens that are left: its tokens, and what is left then."""
    tokens = budget.next_step(num_decodes, left)
    taken = min(left, tokens - num_decodes)
    budget.note(tokens - num_decodes - taken)
    return tokens, left - taken


def test_steps_grow_while_prompts_use_them_up_and_shrink_again() -> None:
    budget = StepBudget(2048)
    crowded = [play(budget, 8, 3000)[0] for _ in range(10 * GROWS_AFTER)]
    sizes = [SMALL_STEP + GROWTH * number for number in range(5)]
    assert sorted(set(crowded)) == sizes == sorted({2048, *sizes}), "up to all that they may have"
    assert [crowded.index(size) for size in sizes] == [GROWS_AFTER * number for number in range(5)]
    calm = [play(budget, 8, 100)[0] for _ in range(20 * GROWS_AFTER)]
    assert calm == sorted(calm, reverse=True)
    assert calm[-1] == SMALL_STEP
    assert play(budget, 8, 3000)[0] == SMALL_STEP, "no crowd of long ago counts"


def test_what_waits_for_something_else_is_no_crowd() -> None:
    budget = StepBudget(8192)
    for _ in range(10 * GROWS_AFTER):
        assert budget.next_step(8, 3000) == SMALL_STEP
        budget.note(SMALL_STEP - 8)


def test_prompts_that_come_at_once_now_and_then_leave_steps_small() -> None:
    budget = StepBudget(8192)
    for _ in range(50):
        left = 16 * 512
        for _ in range(80):  # as many as answers have tokens
            step, left = play(budget, 48, left)
            assert step == SMALL_STEP


@pytest.mark.parametrize("arriving", [1100, 1500, 3000, 6000])
def test_steps_keep_up_with_prompts_that_keep_coming(arriving: int) -> None:
    """So many tokens of prompts a step: what waits is bounded, and less in the end than what makes steps full."""
    budget, left, waiting = StepBudget(8192), 0, []
    for _ in range(3000):
        _, left = play(budget, 100, left + arriving)
        waiting.append(left)
    assert max(waiting) <= 2 * 8192
    assert max(waiting[1500:]) < 8192
