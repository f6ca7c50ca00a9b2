"""The same request has the same tokens, whatever happens around it."""

from __future__ import annotations

import asyncio

import pytest

from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.worker import Worker
from tests.support.wait import until
from tests.workers.harness import ENGINE, POOL, Answer, Shelf, ask, greedy, open_worker, random_prompt

PROMPT = random_prompt(37, 99)
LENGTH = 40
PAGE_BYTES = 8192
"""KV of 16 tokens of the tiny Llama."""
RECIPES = (None, "rank_pattern", "embeddings_all")

_alone: dict[str | None, Answer] = {}


@pytest.fixture(scope="module", params=RECIPES, ids=str)
def recipe(request: pytest.FixtureRequest) -> str | None:
    chosen: str | None = request.param
    return chosen


@pytest.fixture
def version(recipe: str | None, llama: Shelf) -> str | None:
    return llama.version_of(recipe) if recipe else None


@pytest.fixture
async def alone(llama: Shelf, version: str | None) -> Answer:
    """The request by itself, with nothing cached."""
    if version not in _alone:
        async with open_worker(llama, prefix_cache=False) as worker:
            _alone[version] = await ask(worker, PROMPT, version, greedy(LENGTH))
    return _alone[version]


def crowd(worker: Worker, shelf: Shelf, length: int = 30) -> list[asyncio.Task[Answer]]:
    """Requests for the base and for every adapter, under way."""
    return [
        asyncio.ensure_future(ask(worker, random_prompt(3 + 5 * number, number), one, greedy(length)))
        for number, one in enumerate((None, *shelf.versions))
    ]


async def test_in_a_mixed_batch(llama: Shelf, version: str | None, alone: Answer) -> None:
    async with open_worker(llama) as worker:
        others = crowd(worker, llama)
        answers = await asyncio.gather(*(ask(worker, PROMPT, version, greedy(LENGTH)) for _ in range(2)))
        await asyncio.gather(*others)
    assert [answer.tokens for answer in answers] == [alone.tokens] * 2


@pytest.mark.parametrize("budget", [1, 3, 16])
@pytest.mark.slow
async def test_in_chunks(llama: Shelf, version: str | None, alone: Answer, budget: int) -> None:
    async with open_worker(llama, max_batch_tokens=budget) as worker:
        answer = await ask(worker, PROMPT, version, greedy(LENGTH))
        assert worker.stats.num_steps >= len(PROMPT) / budget
    assert answer.tokens == alone.tokens


async def test_from_a_cached_prefix(llama: Shelf, version: str | None, alone: Answer) -> None:
    other = llama.version_of("rslora")
    async with open_worker(llama) as worker:
        await ask(worker, PROMPT, other, greedy(LENGTH))
        first = await ask(worker, PROMPT, version, greedy(LENGTH))
        again = await ask(worker, PROMPT, version, greedy(LENGTH))
        # Its own answer is part of the next prompt, as in a chat.
        prompt = PROMPT + alone.tokens[:20]
        longer = await ask(worker, prompt, version, greedy(LENGTH - 20))
    assert [answer.last.num_cached_tokens for answer in (first, again, longer)] == [0, 32, 48]
    assert first.tokens == again.tokens == alone.tokens
    assert longer.tokens == alone.tokens[20:]


async def test_after_preemption(llama: Shelf, version: str | None, alone: Answer) -> None:
    """Memory for about two of five such requests."""
    engine = EngineConfig(
        device="cpu", max_batch_tokens=64, kv_bytes=11 * PAGE_BYTES, kv_page_tokens=16, prefix_cache=False
    )
    async with open_worker(
        llama, engine=engine, model=ModelConfig(id="base", source=str(llama.base), max_model_len=128)
    ) as worker:
        answers = await asyncio.gather(*(ask(worker, PROMPT, version, greedy(LENGTH)) for _ in range(5)))
        assert worker._engine._scheduler.num_preemptions > 0
    assert [answer.tokens for answer in answers] == [alone.tokens] * 5
    assert all(len(delta.token_ids) == 1 for answer in answers for delta in answer.deltas)


async def test_prompt_logprobs_survive_preemption(llama: Shelf, version: str | None) -> None:
    sampling = greedy(30, logprobs=1, prompt_logprobs=True)
    async with open_worker(llama) as worker:
        expected = await ask(worker, PROMPT, version, sampling)
    engine = EngineConfig(
        device="cpu",
        max_batch_tokens=24,
        logits_chunk_tokens=8,
        kv_bytes=11 * PAGE_BYTES,
        kv_page_tokens=16,
        prefix_cache=False,
    )
    async with open_worker(
        llama, engine=engine, model=ModelConfig(id="base", source=str(llama.base), max_model_len=128)
    ) as worker:
        answers = await asyncio.gather(*(ask(worker, PROMPT, version, sampling) for _ in range(4)))
        assert worker._engine._scheduler.num_preemptions > 0
    wanted = expected.deltas[0].prompt_logprobs
    assert wanted is not None
    for answer in answers:
        assert answer.tokens == expected.tokens
        given = answer.deltas[0].prompt_logprobs
        assert given is not None
        assert [entry.token_id for entry in given] == list(PROMPT)
        assert [entry.logprob for entry in given[1:]] == pytest.approx(
            [entry.logprob for entry in wanted[1:]], abs=1e-4
        )


@pytest.mark.parametrize("recipe", RECIPES[1:], indirect=True)
async def test_after_eviction_and_reload(llama: Shelf, version: str, alone: Answer) -> None:
    async with open_worker(llama) as worker:
        pages = [worker._parts.pool.num_pages(llama.weights[one].manifest) for one in llama.versions]
        pool_bytes = max(pages) * worker._parts.pool.layout.page_bytes
    pool = PoolConfig(max_rank=POOL.max_rank, pool_bytes=pool_bytes)
    async with open_worker(llama, pool=pool, prefix_cache=False) as worker:
        for _ in range(3):
            assert (await ask(worker, PROMPT, version, greedy(LENGTH))).tokens == alone.tokens
            for other in llama.versions:
                if other != version:
                    await ask(worker, PROMPT[:5], other, greedy(2))
        residency = await worker.residency()
        assert residency.evictions >= 9
        assert residency.reloads_after_eviction >= 2


async def test_beside_an_adapter_that_overflows(llama: Shelf, version: str | None, alone: Answer) -> None:
    """What another adapter makes of its own rows reaches no other: not through a batch, nor through reused KV pages."""
    shelf = Shelf(llama.base)
    for folder in llama.folders.values():
        shelf.put(folder)
    huge = shelf.put_huge(llama.version_of("rank16"), factor=1e30)
    engine = ENGINE.model_copy(update={"kv_bytes": 48 * PAGE_BYTES})
    async with open_worker(shelf, engine=engine) as worker:
        for _ in range(3):
            refused = [asyncio.ensure_future(ask(worker, PROMPT, huge, greedy(8))) for _ in range(4)]
            answers = await asyncio.gather(*(ask(worker, PROMPT, version, greedy(LENGTH)) for _ in range(2)))
            assert [answer.tokens for answer in answers] == [alone.tokens] * 2
            for error in await asyncio.gather(*refused, return_exceptions=True):
                assert getattr(error, "code", None) == "non_finite_output", error
            await until(lambda: worker._engine.num_running == 0)
