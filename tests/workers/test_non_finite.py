"""What an adapter overflows stays its own: nothing that it left in memory is read into another request's numbers."""

from __future__ import annotations

import asyncio

import pytest
import torch

from lorafleet.workers.config import ModelConfig
from lorafleet.workers.worker import Worker
from tests.workers.harness import Answer, Shelf, ask, greedy, open_worker, random_prompt

NUM_OTHERS = 192
LENGTH = 12


def with_huge(llama: Shelf) -> tuple[Shelf, str]:
    """The adapters, and the version of one that overflows."""
    shelf = Shelf(llama.base)
    for folder in llama.folders.values():
        shelf.put(folder)
    return shelf, shelf.put_huge(llama.version_of("rank16"), factor=1e30)


async def ask_others(worker: Worker, llama: Shelf) -> list[Answer | BaseException]:
    """Requests of many lengths for the base and for every sound adapter."""
    versions = (None, *llama.versions)
    return await asyncio.gather(
        *(
            ask(worker, random_prompt(1 + 7 * number % 83, number), versions[number % len(versions)], greedy(LENGTH))
            for number in range(NUM_OTHERS)
        ),
        return_exceptions=True,
    )


def tokens_of(answers: list[Answer | BaseException]) -> list[object]:
    return [answer.tokens if isinstance(answer, Answer) else answer for answer in answers]


async def ask_huge(worker: Worker, huge: str, length: int) -> None:
    with pytest.raises(Exception, match="not finite"):
        await ask(worker, random_prompt(length, 7), huge, greedy(8))


async def test_others_after_it(llama: Shelf) -> None:
    shelf, huge = with_huge(llama)
    async with open_worker(llama, max_running=32) as worker:
        expected = tokens_of(await ask_others(worker, llama))
    async with open_worker(shelf, max_running=32) as worker:
        await ask_huge(worker, huge, 61)
        assert tokens_of(await ask_others(worker, llama)) == expected
        cache = worker._parts.cache
        assert all(bool(tensor.isfinite().all()) for tensor in (*cache.keys, *cache.values))


@pytest.mark.slow
async def test_others_beside_it(llama: Shelf) -> None:
    """Its pages are not finite until the end of its prompt, whose chunks run beside the decodes of others."""
    shelf, huge = with_huge(llama)
    async with open_worker(llama, max_running=32, max_batch_tokens=64) as worker:
        expected = tokens_of(await ask_others(worker, llama))
    async with open_worker(shelf, max_running=32, max_batch_tokens=64) as worker:
        refused = [asyncio.ensure_future(ask_huge(worker, huge, 20 + 30 * number)) for number in range(8)]
        assert tokens_of(await ask_others(worker, llama)) == expected
        await asyncio.gather(*refused)


@pytest.mark.slow
async def test_others_after_one_that_left(llama: Shelf) -> None:
    """Nobody saw that its numbers were not finite: it left in the middle of its prompt."""
    shelf, huge = with_huge(llama)
    async with open_worker(llama, max_running=32) as worker:
        expected = tokens_of(await ask_others(worker, llama))
    async with open_worker(shelf, max_running=32, max_batch_tokens=8) as worker:
        leaving = asyncio.ensure_future(ask(worker, random_prompt(100, 7), huge, greedy(8)))
        while worker.stats.num_steps < 3:
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert tokens_of(await ask_others(worker, llama)) == expected


@pytest.mark.gpu
async def test_others_on_a_gpu(llama: Shelf) -> None:
    """Eight that overflow, in one batch with others and before them; the cache then holds finite values only."""
    shelf, huge = with_huge(llama)
    model = ModelConfig(id="base", source=str(llama.base), dtype="float32")
    async with open_worker(llama, model=model, device="cuda") as worker:
        expected = tokens_of(await ask_others(worker, llama))
    async with open_worker(shelf, model=model, device="cuda") as worker:
        refused = [asyncio.ensure_future(ask_huge(worker, huge, 20 + 30 * number)) for number in range(8)]
        assert tokens_of(await ask_others(worker, llama)) == expected
        await asyncio.gather(*refused)
        assert tokens_of(await ask_others(worker, llama)) == expected
        torch.cuda.synchronize()
        cache = worker._parts.cache
        assert all(bool(tensor.isfinite().all()) for tensor in (*cache.keys, *cache.values))
