"""Twelve adapters through a pool that holds three of them, fetched from the adapter store."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.adapter_store.base_weights import CheckpointWeights
from lorafleet.adapter_store.service import AdapterStore
from lorafleet.adapter_store.source_config import DirectoryConfig
from lorafleet.workers.config import ModelConfig, PoolConfig
from lorafleet.workers.model.geometry import read_geometry
from lorafleet.workers.worker import Worker
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.oracle import generate_with_peft
from tests.workers.harness import Answer, Shelf, ask, greedy, open_worker, random_prompt

NUM_ADAPTERS = 12
NUM_REQUESTS = 200
LENGTH = 8
RANKS = (4, 8, 12, 16)


@pytest.fixture(scope="module")
def shelf(base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Twelve adapters on all seven projections, of ranks up to 16, the most popular first."""
    shelf = Shelf(base_of("llama_tied"))
    root = tmp_path_factory.mktemp("twelve")
    for number in range(NUM_ADAPTERS):
        rank = RANKS[number % len(RANKS)]
        shelf.put(make_adapter(root / f"adapter-{number}", shelf.base, "rank16", seed=number, r=rank))
    return shelf


@pytest.fixture
async def store(shelf: Shelf, tmp_path: Path) -> AdapterStore:
    """The real store over the shelf's folders, with every adapter published."""
    root = next(iter(shelf.folders.values())).parent
    store = AdapterStore(
        state_dir=tmp_path,
        sources=[DirectoryConfig(name="disk", kind="directory", root=str(root))],
        geometry=read_geometry(ModelConfig(id="base", source=str(shelf.base)), "cpu"),
        max_rank=64,
        host_cache_bytes=1 << 20,
        base_weights=CheckpointWeights(shelf.base),
    )
    published = [(await store.publish("disk", folder.name)).version for folder in shelf.folders.values()]
    assert published == shelf.versions
    return store


def pool_for(shelf: Shelf, worker: Worker, num_adapters: int) -> PoolConfig:
    """Room for the largest `num_adapters` adapters."""
    pool = worker._parts.pool
    pages = sorted(pool.num_pages(weights.manifest) for weights in shelf.weights.values())
    return PoolConfig(max_rank=64, pool_bytes=sum(pages[-num_adapters:]) * pool.layout.page_bytes)


@pytest.mark.slow
async def test_all_are_right_and_none_starves(shelf: Shelf, store: AdapterStore) -> None:
    rng = random.Random(0)
    popularity = [1 / (1 + number) for number in range(NUM_ADAPTERS)]
    asked = rng.choices(shelf.versions, popularity, k=NUM_REQUESTS)
    prompts = [random_prompt(3 + number % 20, number % 7) for number in range(NUM_REQUESTS)]
    pinned = shelf.versions[5]

    async with open_worker(shelf) as worker:
        small = pool_for(shelf, worker, 3)
        expected = await asyncio.gather(
            *(ask(worker, prompt, version, greedy(LENGTH)) for prompt, version in zip(prompts, asked, strict=True))
        )
        assert (await worker.residency()).evictions == 0

    async with open_worker(shelf, pool=small, fetch=store.fetch, max_running=16, max_wait_s=0.5) as worker:
        await worker.make_resident(pinned, pinned=True)
        slot = next(use.slot for use in (await worker.residency()).adapters)

        async def later(number: int) -> Answer:
            await asyncio.sleep(number * 0.002)
            return await ask(worker, prompts[number], asked[number], greedy(LENGTH))

        answers = await asyncio.gather(*(later(number) for number in range(NUM_REQUESTS)))
        residency = await worker.residency()
        by_version = {use.version: use for use in residency.adapters}
        assert by_version[pinned].slot == slot, "a pinned adapter left"
        assert by_version[pinned].pinned
        assert residency.pages_used == sum(use.pages for use in residency.adapters)
        assert all((use.leases, use.holds, use.state) == (0, 0, "resident") for use in residency.adapters)
        assert residency.loads == residency.evictions + len(residency.adapters)
        assert residency.evictions >= NUM_ADAPTERS - 3
        await worker.reconcile({})
        state = await worker.state()
        assert (state.adapter_pages.used, state.adapters) == (0, ())

    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert min(Counter(asked).values()) > 0
    for number in rng.sample(range(NUM_REQUESTS), 6):
        oracle = generate_with_peft(shelf.base, shelf.folders[asked[number]], prompts[number], LENGTH)
        assert answers[number].tokens == oracle.tokens


async def test_every_adapter_gets_in_beside_a_hot_one(shelf: Shelf, store: AdapterStore) -> None:
    """Streams of two hot adapters never end; the ten others are served, one after another, through what is left."""
    async with open_worker(shelf) as worker:
        small = pool_for(shelf, worker, 2)
    hot, cold = shelf.versions[:2], shelf.versions[2:]
    async with open_worker(shelf, pool=small, fetch=store.fetch, max_running=8, max_wait_s=0.1) as worker:
        is_over = False

        async def insist(version: str) -> int:
            count = 0
            while not is_over:
                await ask(worker, random_prompt(4, 1), version, greedy(6))
                count += 1
            return count

        crowd = [asyncio.ensure_future(insist(version)) for version in hot for _ in range(4)]
        await asyncio.wait_for(
            asyncio.gather(*(ask(worker, random_prompt(4, 2), version, greedy(4)) for version in cold)), 60
        )
        is_over = True
        assert all(count > 0 for count in await asyncio.gather(*crowd))
