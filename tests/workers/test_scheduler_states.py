"""Arrivals, aborts and slow loads in any order: pages and leases are never lost, and there is always progress."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from lorafleet.workers.sequence import Sequence
from tests.workers.stepping import Stepping

NUM_PAGES = 12
MAX_TOKENS = 40
"""Prompt and answer together; they fill 10 pages, so that any sequence fits alone."""


class SchedulerMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(
        budget=st.integers(1, 24),
        running=st.integers(1, 6),
        capacity=st.integers(1, 3),
        lag=st.booleans(),
        prefix_cache=st.booleans(),
    )
    def start(self, budget: int, running: int, capacity: int, lag: bool, prefix_cache: bool) -> None:
        self.run = Stepping(
            num_pages=NUM_PAGES,
            max_batch_tokens=budget,
            max_running=running,
            capacity=capacity,
            lag=lag,
            prefix_cache=prefix_cache,
        )

    @rule(
        target=sequences,
        num_prompt=st.integers(1, MAX_TOKENS - 1),
        max_tokens=st.integers(1, MAX_TOKENS),
        version=st.sampled_from([None, "a", "b", "c", "d"]),
        shared=st.booleans(),
        prompt_logprobs=st.booleans(),
    )
    def arrive(
        self, num_prompt: int, max_tokens: int, version: str | None, shared: bool, prompt_logprobs: bool
    ) -> Sequence:
        return self.run.add(
            num_prompt,
            min(max_tokens, MAX_TOKENS - num_prompt),
            version,
            prompt=tuple(range(1, num_prompt + 1)) if shared else None,
            prompt_logprobs=prompt_logprobs,
        )

    @rule(sequence=sequences)
    def abort(self, sequence: Sequence) -> None:
        if not sequence.is_over:
            self.run.finish(sequence)

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            made = sum(one.num_made + one.num_computed for one in self.run.live)
            preempted = self.run.scheduler.num_preemptions
            is_held_up = self.run.gate.is_loading_held_up
            counts = self.run.step()
            if not is_held_up and self.run.live and not self.run.gate.loading and not self.run.lag:
                assert counts or made == 0 or preempted < self.run.scheduler.num_preemptions, "it stands still"
            self.run.check()

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.run.clock.now_s += seconds

    @rule(is_held_up=st.booleans())
    def hold_up_loading(self, is_held_up: bool) -> None:
        self.run.gate.is_loading_held_up = is_held_up

    @invariant()
    def accounts_are_exact(self) -> None:
        if hasattr(self, "run"):
            self.run.check()

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        self.run.gate.is_loading_held_up = False
        live = self.run.live
        self.run.clock.now_s += 100.0
        self.run.run(max_steps=60 * (len(live) + 1))
        assert all(one.num_made == one.max_tokens for one in live), "each got all its tokens"
        self.run.check()
        assert self.run.cache.counts.used == 0
        assert not +self.run.gate.leases
        assert self.run.cache.num_available == NUM_PAGES


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
