"""Callers who go away: what they held is given back at once, and nobody else notices."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing

import pytest

from tests.support.wait import until
from tests.workers.harness import Answer, Shelf, ask, assert_idle, greedy, open_worker, random_prompt, request_of

NUM_STREAMS = 100
NUM_CLOSED = 80
LENGTH = 60


@pytest.mark.slow
async def test_eighty_of_a_hundred_vanish(llama: Shelf) -> None:
    rng = random.Random(1)
    versions = [None, *llama.versions]
    plans = [
        (random_prompt(2 + number % 30, number), versions[number % len(versions)]) for number in range(NUM_STREAMS)
    ]
    closed_after = {number: rng.randrange(LENGTH) for number in rng.sample(range(NUM_STREAMS), NUM_CLOSED)}

    async with open_worker(llama, max_running=32, max_batch_tokens=64) as worker:

        async def stream(number: int) -> Answer:
            prompt, version = plans[number]
            answer = Answer()
            async with aclosing(worker.generate(request_of(prompt, version, greedy(LENGTH)))) as deltas:
                if closed_after.get(number) == 0:
                    # Gone before the first token: the consumer is cancelled while it waits.
                    task = asyncio.ensure_future(anext(deltas))
                    await asyncio.sleep(rng.random() * 0.05)
                    task.cancel()
                    await asyncio.wait([task])
                    return answer
                async for delta in deltas:
                    answer.add(delta)
                    if len(answer.tokens) == closed_after.get(number):
                        break
            return answer

        answers = await asyncio.gather(*(stream(number) for number in range(NUM_STREAMS)))
        ended_s = time.monotonic()
        await until(lambda: worker._engine.num_running + worker._engine.num_waiting == 0, timeout_s=2.0)
        await assert_idle(worker)
        assert time.monotonic() - ended_s < 2.0
        assert worker.stats.served.num_finished["abort"] >= NUM_CLOSED - 20
        assert not worker._streams
        assert not worker._engine._sequences

        for number in rng.sample(sorted(set(range(NUM_STREAMS)) - set(closed_after)), 8):
            prompt, version = plans[number]
            assert answers[number].tokens == (await ask(worker, prompt, version, greedy(LENGTH))).tokens


async def test_an_abort_takes_at_most_two_steps(llama: Shelf) -> None:
    async with open_worker(llama) as worker:
        kept = asyncio.ensure_future(ask(worker, random_prompt(5, 0), None, greedy(200)))
        async with aclosing(worker.generate(request_of(random_prompt(5, 1), None, greedy(200)))) as deltas:
            async for _ in deltas:
                if worker.stats.num_steps >= 5:
                    break
            assert worker.stats.last_batch_sequences == 2
        steps = worker.stats.num_steps
        await until(lambda: worker.stats.last_batch_sequences == 1)
        assert worker.stats.num_steps <= steps + 3, "the one that ran, and two more"
        assert worker.stats.served.num_finished["abort"] == 1
        await kept


async def test_who_waits_for_an_adapter_may_go(llama: Shelf) -> None:
    """While it is fetched, and while there is no room: the weights that came for nobody are let go in time."""
    version = llama.version_of("rank16")
    may_fetch = asyncio.Event()

    async def fetch(wanted: str) -> object:
        await may_fetch.wait()
        return llama.weights[wanted]

    async with open_worker(llama, fetch=fetch) as worker:  # type: ignore[arg-type]
        task = asyncio.ensure_future(ask(worker, random_prompt(5, 0), version, greedy(4)))
        await until(lambda: worker._engine.num_waiting == 1)
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: worker._engine.num_waiting == 0)
        may_fetch.set()
        await until(lambda: worker._loader._loads[version].weights is not None)
        await assert_idle(worker)
        assert (await worker.state()).adapter_pages.used == 0
        # A later request finds them without another fetch.
        may_fetch.clear()
        assert len((await ask(worker, random_prompt(5, 0), version, greedy(4))).tokens) == 4
