"""A worker's surface: residency, draining, and what happens when something fails."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager

import pytest

from lorafleet.adapter_store.errors import UnknownVersion
from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.workers.config import PoolConfig
from lorafleet.workers.errors import (
    AdapterUnavailable,
    EngineFailed,
    InvalidTokenId,
    NonFiniteOutput,
    NoRoomError,
    PromptTooLong,
    UnsupportedModel,
    WorkerConfigError,
    WorkerError,
)
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.worker import Worker
from tests.support.wait import until
from tests.workers.harness import Answer, Shelf, ask, greedy, open_worker, random_prompt, request_of

PROMPT = random_prompt(6, 3)


async def pool_of(shelf: Shelf, *names: str) -> PoolConfig:
    """Room for exactly these adapters together."""
    async with open_worker(shelf) as worker:
        pool = worker._parts.pool
        pages = sum(pool.num_pages(shelf.weights[shelf.version_of(name)].manifest) for name in names)
        return PoolConfig(max_rank=64, pool_bytes=pages * pool.layout.page_bytes)


async def resident(worker: Worker) -> set[str]:
    return {use.version for use in (await worker.residency()).adapters}


# --- residency ---


async def test_make_resident_and_state(llama: Shelf) -> None:
    version = llama.version_of("rank16")
    async with open_worker(llama) as worker:
        assert (await worker.state()).adapters == ()
        await worker.make_resident(version)
        await worker.make_resident(version)
        state = await worker.state()
        (entry,) = state.adapters
        assert (entry.version, entry.rank, entry.pinned, entry.leases) == (version, 16, False, 0)
        assert entry.state == "resident"
        assert state.adapter_pages.used == entry.pages > 0
        assert (state.worker_id, state.device) == ("worker-0", "cpu")
        assert await worker.held_versions() == (version,)
        await until(lambda: worker.routing_stats() == {"resident": (version,), "running": 0, "waiting": 0})
        fetches = llama.num_fetches
        await ask(worker, PROMPT, version, greedy(2))
        assert llama.num_fetches == fetches


async def test_requests_for_one_adapter_fetch_it_once(llama: Shelf) -> None:
    version = llama.version_of("rslora")
    async with open_worker(llama) as worker:
        fetches = llama.num_fetches
        asking = [ask(worker, PROMPT, version, greedy(2)) for _ in range(5)]
        await asyncio.gather(*asking, worker.make_resident(version))
        assert llama.num_fetches == fetches + 1
        assert len(worker.loader.load_s) == 1


async def test_what_is_pinned_held_or_leased_stays(llama: Shelf) -> None:
    pinned, other, third = (llama.version_of(name) for name in ("rank16", "rslora", "rank4_qv"))
    async with open_worker(llama, pool=await pool_of(llama, "rank16", "rslora")) as worker:
        await worker.make_resident(pinned, pinned=True)
        await worker.make_resident(other, hold_s=100.0)
        with pytest.raises(NoRoomError) as refused:
            await worker.make_resident(third)
        assert (refused.value.version, refused.value.free) == (third, 0)
        assert refused.value.in_use + refused.value.pinned == refused.value.total
        with pytest.raises(NoRoomError):
            await worker.estimate(llama.weights[third].manifest)
        assert await resident(worker) == {pinned, other}

        await worker.release_hold(other)
        await worker.release_hold(other)
        pages, victims = await worker.estimate(llama.weights[third].manifest)
        assert victims == (other,)
        async with aclosing(worker.generate(request_of(PROMPT, other, greedy(400)))) as stream:
            await anext(stream)
            with pytest.raises(NoRoomError):
                await worker.make_resident(third)
        await worker.make_resident(third)
        assert await resident(worker) == {pinned, third}
        assert next(use.pages for use in (await worker.residency()).adapters if use.version == third) == pages


async def test_a_request_that_only_a_pin_keeps_out_is_told(llama: Shelf) -> None:
    """Waiting would be in vain, be it pages or slots that are missing."""
    pinned, other = llama.version_of("rank16"), llama.version_of("rank1")
    pools = [await pool_of(llama, "rank16"), PoolConfig(max_rank=64, pool_bytes=32 << 20, max_slots=1)]
    for pool in pools:
        async with open_worker(llama, pool=pool) as worker:
            await worker.make_resident(pinned, pinned=True)
            with pytest.raises(NoRoomError):
                await ask(worker, PROMPT, other, greedy(2))
            await worker.reconcile({pinned: False})
            assert len((await ask(worker, PROMPT, other, greedy(2))).tokens) == 2


async def test_a_worker_without_slots_serves_the_base_alone(llama: Shelf) -> None:
    """No memory is set aside for adapters, and who asks for one is told at once."""
    version = llama.version_of("rank16")
    async with open_worker(llama) as worker:
        expected = (await ask(worker, PROMPT, None, greedy(8))).tokens
    async with open_worker(llama, pool=PoolConfig(max_slots=0)) as worker:
        assert (await worker.state()).adapter_pages.total == 0
        with pytest.raises(NoRoomError):
            await ask(worker, PROMPT, version, greedy(2))
        with pytest.raises(NoRoomError):
            await worker.make_resident(version)
        assert (await ask(worker, PROMPT, None, greedy(8))).tokens == expected


# --- following the store ---


async def test_a_version_without_a_name_drains(llama: Shelf) -> None:
    """Its stream ends with its own tokens, and its pages are free right after."""
    old, new = llama.version_of("rank16"), llama.version_of("rslora")
    async with open_worker(llama) as worker:
        expected = (await ask(worker, PROMPT, old, greedy(60))).tokens
        answer = Answer()
        async with aclosing(worker.generate(request_of(PROMPT, old, greedy(60)))) as stream:
            answer.add(await anext(stream))
            await worker.make_resident(new, hold_s=10.0)
            await worker.reconcile({new: False})
            states = {entry.version: (entry.state, entry.leases) for entry in (await worker.state()).adapters}
            assert states == {old: ("retired", 1), new: ("resident", 0)}
            late = await ask(worker, PROMPT, old, greedy(60))
            async for delta in stream:
                answer.add(delta)
        assert answer.tokens == late.tokens == expected
        await until(lambda: worker._engine.num_running == 0)
        assert await resident(worker) == {new}
        # Nor is its KV of use to anyone.
        await until(lambda: worker._parts.cache.counts.cached == 0)


async def test_what_a_roll_out_waits_for_is_not_let_go(llama: Shelf) -> None:
    """It has no name until it is everywhere; the worker's timer may come before."""
    version = llama.version_of("rank16")
    async with open_worker(llama) as worker:
        with held_up(worker) as may_upload:
            load = asyncio.ensure_future(worker.make_resident(version, hold_s=10.0))
            await until(lambda: version in worker._parts.residency)
            await worker.reconcile({})
            may_upload.set()
            await load
        await worker.reconcile({})
        assert await resident(worker) == {version}
        await worker.release_hold(version)
        await worker.reconcile({})
        assert await resident(worker) == set()


async def test_pinned_ones_come_by_themselves(llama: Shelf) -> None:
    first, second = llama.version_of("rank16"), llama.version_of("rank64")
    async with open_worker(llama, pool=await pool_of(llama, "rank16")) as worker:
        await worker.reconcile({first: True, second: True})
        await until(lambda: first in worker._parts.residency and first not in worker._loader._loads)
        (use,) = (await worker.residency()).adapters
        assert (use.version, use.pinned, use.state) == (first, True, "resident")
        await worker.reconcile({first: False, second: False})
        assert not (await worker.residency()).adapters[0].pinned


async def test_a_retired_version_that_is_wanted_again_stays(llama: Shelf) -> None:
    version = llama.version_of("rank16")
    async with open_worker(llama) as worker:
        async with aclosing(worker.generate(request_of(PROMPT, version, greedy(200)))) as stream:
            await anext(stream)
            await worker.reconcile({})
            assert (await worker.residency()).adapters[0].state == "retired"
            await worker.make_resident(version)
        await until(lambda: worker._engine.num_running == 0)
        assert await resident(worker) == {version}


# --- failures ---


@pytest.mark.parametrize(
    "error", [UnknownVersion("unknown_version", "there is no such version"), OSError("disk")], ids=str
)
async def test_a_failed_fetch_fails_those_who_want_it_and_nobody_else(llama: Shelf, error: Exception) -> None:
    broken, good = llama.version_of("rank16"), llama.version_of("rslora")
    is_broken = True

    async def fetch(version: str) -> AdapterWeights:
        if version == broken and is_broken:
            raise error
        return llama.weights[version]

    async with open_worker(llama, fetch=fetch) as worker:
        going = asyncio.ensure_future(ask(worker, PROMPT, good, greedy(30)))
        results = await asyncio.gather(
            ask(worker, PROMPT, broken),
            ask(worker, PROMPT, broken),
            worker.make_resident(broken),
            return_exceptions=True,
        )
        # What has a code of its own says it to the client; anything else is no concern of theirs.
        expected = type(error) if hasattr(error, "code") else AdapterUnavailable
        assert [type(result) for result in results] == [expected] * 3
        assert not any("disk" in str(result) for result in results)
        assert len((await going).tokens) == 30
        is_broken = False
        assert len((await ask(worker, PROMPT, broken, greedy(3))).tokens) == 3


async def test_a_failed_copy_gives_its_pages_back(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    version = llama.version_of("rank16")
    async with open_worker(llama) as worker:
        with monkeypatch.context() as patch:
            patch.setattr(type(worker._parts.pool), "upload", _broken)
            results = await asyncio.gather(
                ask(worker, PROMPT, version), worker.make_resident(version, pinned=True), return_exceptions=True
            )
        assert [type(result) for result in results] == [AdapterUnavailable] * 2
        assert (await worker.state()).adapter_pages.used == 0
        assert len((await ask(worker, PROMPT, version, greedy(3))).tokens) == 3


async def test_a_caller_that_gives_up_on_a_load_harms_nobody(llama: Shelf) -> None:
    version = llama.version_of("rank16")
    async with open_worker(llama) as worker:
        with held_up(worker) as may_upload:
            load = asyncio.ensure_future(worker.make_resident(version))
            await until(lambda: version in worker._parts.residency)
            load.cancel()
            await asyncio.wait([load])
            may_upload.set()
        assert len((await ask(worker, PROMPT, version, greedy(3))).tokens) == 3


@pytest.mark.parametrize(
    ("prompt", "settings", "error"),
    [
        ((), {}, PromptTooLong),
        (random_prompt(512, 0), {}, PromptTooLong),
        ((3, 304), {}, InvalidTokenId),
        ((3, -1), {}, InvalidTokenId),
        ((3,), {"stop_token_ids": (10**9,), "min_tokens": 2}, InvalidTokenId),
        ((3,), {"logit_bias": {304: 1.0}}, InvalidTokenId),
    ],
    ids=["empty", "too_long", "token_too_large", "token_negative", "stop_token", "biased_token"],
)
async def test_a_bad_request_is_refused(
    llama: Shelf, prompt: tuple[int, ...], settings: dict[str, object], error: type[WorkerError]
) -> None:
    async with open_worker(llama) as worker:
        with pytest.raises(error):
            await ask(worker, prompt, None, greedy(4, **settings))
        assert len((await ask(worker, PROMPT, None, greedy(4))).tokens) == 4


async def test_odd_settings_end_no_loop(llama: Shelf) -> None:
    async with open_worker(llama) as worker:
        odd = [
            SamplingParams(max_tokens=3, temperature=1e-45),
            SamplingParams(max_tokens=3, temperature=2.0, top_p=1e-45, top_k=10**12),
            SamplingParams(max_tokens=3, seed=-(2**63), top_k=10**40),
            SamplingParams(max_tokens=3, seed=2**63 - 1, logprobs=20),
            SamplingParams(max_tokens=3, min_tokens=3, stop_token_ids=tuple(range(304))),
            SamplingParams(max_tokens=3, min_p=1.0, logit_bias=dict.fromkeys(range(304), -100)),
            SamplingParams(
                max_tokens=3,
                min_tokens=3,
                temperature=1e-5,
                repetition_penalty=10,
                frequency_penalty=2,
                stop_token_ids=tuple(range(304)),
            ),
        ]
        answers = await asyncio.gather(*(ask(worker, PROMPT, None, sampling) for sampling in odd))
        assert [len(answer.tokens) for answer in answers] == [3] * len(odd)
        assert answers[0].tokens == (await ask(worker, PROMPT, None, greedy(3))).tokens


async def test_an_answer_ends_where_the_model_does(llama: Shelf) -> None:
    async with open_worker(llama) as worker:
        answer = await ask(worker, random_prompt(505, 0), None, SamplingParams(temperature=0.0, ignore_eos=True))
        assert (len(answer.tokens), answer.last.finish_reason) == (512 - 505, "length")


async def test_equal_request_ids_are_kept_apart(llama: Shelf) -> None:
    """A retry may race its first attempt."""

    async def collect(request: EngineRequest, worker: Worker) -> tuple[int, ...]:
        return tuple([token async for delta in worker.generate(request) for token in delta.token_ids])

    async with open_worker(llama) as worker:
        requests = [EngineRequest("same", None, random_prompt(5, seed), greedy(8)) for seed in range(2)]
        tokens = await asyncio.gather(*(collect(request, worker) for request in requests))
        assert tokens[0] != tokens[1]
        assert [len(one) for one in tokens] == [8, 8]


async def test_a_step_that_fails_ends_all_streams_and_shows(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_worker(llama, ends_well=False) as worker:
        running = [asyncio.ensure_future(ask(worker, PROMPT, None, greedy(400))) for _ in range(3)]
        await until(lambda: worker._engine.num_running == 3)
        with held_up(worker):
            load = asyncio.ensure_future(worker.make_resident(llama.version_of("rank16")))
            await until(lambda: bool(worker._loader._loads))
            monkeypatch.setattr(worker._parts.runner, "launch", _broken)
            results = await asyncio.gather(*running, load, return_exceptions=True)
        assert [type(result) for result in results] == [EngineFailed] * 4
        with pytest.raises(EngineFailed, match="RuntimeError: out of luck"):
            worker.check_health()
        with pytest.raises(EngineFailed):
            await ask(worker, PROMPT, None)
        with pytest.raises(EngineFailed):
            await worker.state()


async def test_a_loop_that_stands_still_shows(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_worker(llama, stall_s=30.0) as worker:
        worker.check_health()
        is_held, may_go = threading.Event(), threading.Event()

        def stand_still() -> None:
            is_held.set()
            may_go.wait(10)

        call = worker._engine.call(stand_still)
        await until(is_held.is_set)
        worker.check_health()
        monkeypatch.setattr(worker._engine, "_clock", lambda: time.monotonic() + 31.0)
        with pytest.raises(EngineFailed, match="has stood still for 31 s, more than 30"):
            worker.check_health()
        stood_since_s = worker._engine._loop_alive_s
        may_go.set()
        await asyncio.wrap_future(call)
        await until(lambda: worker._engine._loop_alive_s > stood_since_s)
        worker.check_health()


async def test_close_ends_streams(llama: Shelf) -> None:
    version = llama.version_of("rank16")

    async def never(wanted: str) -> AdapterWeights:
        await asyncio.Event().wait()
        return llama.weights[wanted]

    threads = threading.active_count()
    async with open_worker(llama, fetch=never, ends_well=False) as worker:
        streams = [asyncio.ensure_future(ask(worker, PROMPT, one, greedy(400))) for one in (None, version)]
        load = asyncio.ensure_future(worker.make_resident(version))
        await until(lambda: worker._engine.num_running == 1)
        await asyncio.to_thread(worker.close)
        results = await asyncio.gather(*streams, load, return_exceptions=True)
        assert [type(result) for result in results] == [EngineFailed] * 3
        with pytest.raises(EngineFailed):
            await ask(worker, PROMPT, None)
        # `to_thread` keeps one of its own.
        await until(lambda: threading.active_count() <= threads + 1)


async def test_a_stream_that_is_closed_after_the_end_is_no_error(llama: Shelf) -> None:
    async with open_worker(llama, ends_well=False) as worker:
        stream = worker.generate(request_of(PROMPT, None, greedy(400)))
        await anext(stream)
        await asyncio.to_thread(worker.close)
        await stream.aclose()
        assert not worker._streams


ERRORS = [
    NoRoomError("v" * 40, 5, 1, 2, 3, 6),
    WorkerConfigError("worker.kv_bytes: 1"),
    UnsupportedModel("no"),
    EngineFailed("ended"),
    AdapterUnavailable("away"),
    PromptTooLong("long"),
    InvalidTokenId("304"),
    NonFiniteOutput("inf"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_errors_survive_pickling(error: WorkerError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.code) == (type(error), str(error), error.code)


def test_codes_are_distinct() -> None:
    assert len({error.code for error in ERRORS}) == len(ERRORS)


def _broken(*args: object) -> None:
    raise RuntimeError("out of luck")


@contextmanager
def held_up(worker: Worker) -> Iterator[threading.Event]:
    """Adapters are not copied into the pool until the event is set."""
    may_upload, upload = threading.Event(), worker._parts.pool.upload

    def wait_and_upload(*args: object) -> object:
        assert may_upload.wait(10)
        return upload(*args)  # type: ignore[arg-type]

    worker._parts.pool.upload = wait_and_upload  # type: ignore[method-assign, assignment]
    try:
        yield may_upload
    finally:
        may_upload.set()
        worker._parts.pool.upload = upload  # type: ignore[method-assign]
