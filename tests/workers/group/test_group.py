"""A worker of several processes over gloo: its answers are those of one, and its processes live and end together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import pytest

from lorafleet.workers.config import EngineConfig, PoolConfig
from lorafleet.workers.errors import EngineFailed, NoRoomError, WorkerConfigError, WorkerError
from lorafleet.workers.group import leader
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.worker import Worker
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.wait import eventually, until
from tests.workers.group import broken_ranks
from tests.workers.harness import Answer, Shelf, ask, assert_pefts, greedy, open_worker, random_prompt, request_of
from tests.workers.test_step_in_flight import PAGE_BYTES, ask_all, assert_same

ROOT = Path(__file__).parents[3]


def is_alive(pid: int) -> bool:
    """A process that has ended, but whose parent has not asked how, does not live."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def other_pids(worker: Worker) -> list[int]:
    return [rank.pid for rank in (await worker.state()).ranks[1:]]


def open_ports(pid: int) -> list[str]:
    """Addresses, as hexadecimals, at which a process takes connections."""
    sockets, found = set(), []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just been closed
            sockets.add(str(descriptor.readlink()))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            (
                _,
                address,
                _,
                state,
                *_,
            ) = line.split()
            if state == "0A" and f"socket:[{line.split()[9]}]" in sockets:
                found.append(address)
    return found


def num_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Have other ranks begin with a function of `broken_ranks`."""

    def begin_with(function: Callable[[], None]) -> None:
        broken = f"from tests.workers.group import broken_ranks; broken_ranks.{function.__name__}(); rank_process.run"
        monkeypatch.setattr(leader, "_BOOT", leader._BOOT.replace("rank_process.run", broken))

    return begin_with


async def test_ranks_answer_as_one_and_end_with_one_that_is_killed(llama: Shelf) -> None:
    """A rank that cannot take an adapter refuses it for all, and later adapters are not confused by it."""
    versions = llama.versions[:3]
    async with open_worker(llama) as alone:
        expected = [await ask(alone, random_prompt(20, 1), version, greedy(8)) for version in (None, *versions)]
    async with open_worker(llama, tensor_parallel_size=2, ends_well=False) as worker:
        (pid,) = await other_pids(worker)
        answers = await asyncio.gather(
            *(ask(worker, random_prompt(20, 1), version, greedy(8)) for version in (None, *versions))
        )
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
        state = await worker.state()
        assert [(rank.rank, rank.device) for rank in state.ranks] == [(0, "cpu"), (1, "cpu")]
        assert state.ranks[0].pid == os.getpid()
        addresses = {address.partition(":")[0] for rank in state.ranks for address in open_ports(rank.pid)}
        assert addresses <= {"0100007F"}, "a port that asks for no secret is open beyond 127.0.0.1"

        stream = worker.generate(request_of(random_prompt(5, 2), versions[0], greedy(400)))
        await anext(stream)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineFailed):
            async for _ in stream:
                pass
        await until(lambda: worker.is_stalled)
        with pytest.raises(EngineFailed, match="rank 1 of the worker's group was ended by SIGKILL"):
            worker.check_health()
        with pytest.raises(EngineFailed):
            await ask(worker, random_prompt(5, 2))
    assert not is_alive(pid)


@pytest.mark.slow
async def test_an_adapter_that_one_rank_cannot_take_is_refused_by_all(
    llama: Shelf, breaking: Callable[[Callable[[], None]], None]
) -> None:
    """Slots stay the same on all ranks: later adapters answer as on a worker of one."""
    large = llama.version_of("rank64")
    others = [version for version in llama.versions if llama.weights[version].manifest.rank < broken_ranks.LARGE_RANK]
    async with open_worker(llama) as alone:
        expected = [await ask(alone, random_prompt(20, 1), version, greedy(8)) for version in others]
    breaking(broken_ranks.have_no_room_for_large_adapters)
    async with open_worker(llama, tensor_parallel_size=2) as worker:
        attempts = (ask(worker, random_prompt(20, 1), version, greedy(8)) for version in (large, *others))
        refused, *answers = await asyncio.gather(*attempts, return_exceptions=True)
        assert isinstance(refused, NoRoomError)
        assert [getattr(answer, "tokens", answer) for answer in answers] == [answer.tokens for answer in expected]
        with pytest.raises(NoRoomError):
            await worker.make_resident(large)
        pages = (await worker.state()).adapter_pages.used
        assert pages == sum(one.pages for one in (await worker.state()).adapters)
        assert large not in await worker.held_versions()


async def test_a_version_is_replaced_while_its_stream_is_under_way(
    base_of: Callable[[BaseKind], Path], tmp_path: Path, breaking: Callable[[Callable[[], None]], None]
) -> None:
    """The stream keeps its version, the next request has the new one, and no step has both: all logprobs are PEFT's.

    One rank copies more slowly. There are two slots, so each version takes that of the one before the last.
    """
    shelf = Shelf(base_of("llama"))
    versions = [
        shelf.put(make_adapter(tmp_path / f"seed{seed}", shelf.base, "rank16", seed=seed, strength=1.5))
        for seed in range(3)
    ]
    pool = PoolConfig(max_rank=16, max_slots=2, pool_bytes=4 << 20)
    prompt, sampling = random_prompt(12, 7), greedy(150, logprobs=0, prompt_logprobs=True)
    breaking(broken_ranks.copy_slowly)
    async with open_worker(shelf, pool=pool, tensor_parallel_size=2) as worker:
        for old, new in pairwise(versions):
            answer = Answer()
            async with aclosing(worker.generate(request_of(prompt, old, sampling))) as stream:
                answer.add(await anext(stream))
                await worker.make_resident(new, hold_s=10.0)
                await worker.reconcile({new: False})
                await worker.release_hold(new)
                states = {each.version: (each.state, each.leases) for each in (await worker.state()).adapters}
                assert states == {old: ("retired", 1), new: ("resident", 0)}
                beside = asyncio.ensure_future(ask(worker, prompt, new, sampling))
                async for delta in stream:
                    answer.add(delta)
            assert_pefts(shelf, old, prompt, answer, 1e-4)
            assert_pefts(shelf, new, prompt, await beside, 1e-4)
            assert answer.tokens != (await beside).tokens
            assert await worker.held_versions() == (new,)


@pytest.mark.slow
async def test_a_failed_copy_on_one_rank_fails_the_load_alone(
    llama: Shelf, breaking: Callable[[Callable[[], None]], None]
) -> None:
    breaking(broken_ranks.lose_an_upload)
    async with open_worker(llama, tensor_parallel_size=2) as worker:
        with pytest.raises(WorkerError, match="rank 1: RuntimeError: the copy failed"):
            await ask(worker, random_prompt(20, 1), llama.versions[0], greedy(8))
        assert len((await ask(worker, random_prompt(20, 1), None, greedy(8))).tokens) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (broken_ranks.refuse_to_start, WorkerConfigError, "rank 1: no memory is left here"),
        (broken_ranks.end_while_starting, EngineFailed, "rank 1 of the worker's group ended with exit code 7"),
    ],
)
async def test_what_keeps_a_rank_from_starting_is_told(
    llama: Shelf,
    breaking: Callable[[Callable[[], None]], None],
    function: Callable[[], None],
    error: type[Exception],
    message: str,
) -> None:
    breaking(function)
    with pytest.raises(error, match=re.escape(message)):
        async with open_worker(llama, tensor_parallel_size=2):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
async def test_a_rank_that_stands_still_ends_the_group(llama: Shelf, is_busy: bool) -> None:
    async with open_worker(llama, tensor_parallel_size=4, stall_s=2.0, ends_well=False) as worker:
        pids = await other_pids(worker)
        stream = worker.generate(request_of(random_prompt(5, 2), None, greedy(400)))
        await anext(stream)
        if not is_busy:
            await stream.aclose()
        os.kill(pids[1], signal.SIGSTOP)
        await until(lambda: worker.is_stalled)
        with pytest.raises(EngineFailed, match="stood still"):
            worker.check_health()
        if is_busy:
            with pytest.raises(EngineFailed):
                async for _ in stream:
                    pass
    assert not any(map(is_alive, pids))


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.workers.harness import Shelf, open_worker

async def main():
    async with open_worker(Shelf(Path(sys.argv[1])), tensor_parallel_size=4) as worker:
        print(*(rank.pid for rank in (await worker.state()).ranks[1:]), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_no_rank_outlives_the_first(llama: Shelf, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(llama.base)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_alive, pids))
    finally:
        process.send_signal(number)
        process.wait(30)
    eventually(lambda: not any(map(is_alive, pids)))


@pytest.mark.slow
async def test_steps_in_flight_on_several_ranks(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a GPU: tokens of the step in flight go from the first rank to the others. Also while preempted."""
    expected, _ = await ask_all(llama)
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
    assert_same((await ask_all(llama, tensor_parallel_size=2))[0], expected)
    # A page takes half as much on each of two.
    scarce = EngineConfig(device="cpu", max_batch_tokens=40, logits_chunk_tokens=6, kv_bytes=11 * PAGE_BYTES // 2)
    answers, num_preemptions = await ask_all(llama, engine=scarce, tensor_parallel_size=2)
    assert_same(answers, expected)
    assert num_preemptions >= 3


@pytest.mark.slow
async def test_closing_leaves_no_process_and_no_descriptor(llama: Shelf) -> None:
    counts = []
    for _ in range(3):
        async with open_worker(llama, tensor_parallel_size=2) as worker:
            pids = await other_pids(worker)
            await ask(worker, random_prompt(5, 2), llama.versions[0], greedy(3))
        del worker
        assert not any(map(is_alive, pids))
        counts.append(num_descriptors())
    assert counts[2] <= counts[1] + 1, "more than the store's"
