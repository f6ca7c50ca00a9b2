"""Processes in reserve: when one is started, who starts it, and when it ends by itself."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorafleet.cluster import ray_internals
from lorafleet.cluster.worker import spare_process
from lorafleet.cluster.worker.spare_keeper import (
    LONGEST_PAUSE_S,
    LOOK_S,
    PAUSE_S,
    READY,
    RETRY_PAUSE_S,
    STARTING,
    FileLock,
    SpareKeeper,
    keeper_lock,
    slots,
)
from lorafleet.cluster.worker.spare_process import LEAVE_S, PATIENCE_S
from tests.support.wait import until

IMPORTS = """
import torch
def refuse(*_):
    raise AssertionError("the GPUs are looked at while a worker's modules are imported")
asked = ("is_available", "device_count", "current_device", "get_device_capability", "get_device_name", "_lazy_init")
own = {name: getattr(torch.cuda, name) for name in asked}
for name in asked:
    setattr(torch.cuda, name, refuse)
import lorafleet.cluster.worker.replica
from lorafleet.cluster.worker.spare_process import has_seen_gpus
before = has_seen_gpus()
print(before, own["is_available"]() == has_seen_gpus())
"""

HOLDER = """
import sys
from pathlib import Path
from lorafleet.cluster.worker.spare_keeper import FileLock
print(FileLock(Path(sys.argv[1])).acquire(sys.argv[2]), flush=True)
sys.stdin.read()
"""

SPARE = """
import sys
from pathlib import Path
from types import SimpleNamespace
given = Path(sys.argv[2])
sys.modules["lorafleet.cluster.ray_internals"] = SimpleNamespace(is_actor=given.exists)
from lorafleet.cluster.worker import spare_process
spare_process.LOOK_S, spare_process.LEAVE_S, spare_process.PATIENCE_S = 0.05, 0.1, 1.0
is_ready = SimpleNamespace(is_set=lambda: True)
spare_process._guard(Path(sys.argv[1]), is_ready)
print("given")
"""


@contextmanager
def held(lock: FileLock, state: str = READY) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock; it is killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(lock.path), state]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "True\n"
            yield process
        finally:
            process.kill()


def seconds_until_due(keeper: SpareKeeper, now_s: float) -> int:
    """Whole seconds of looks until a process is to be started."""
    return next(s for s in range(10_000) if keeper.is_due(now_s + s))


def test_a_lock_is_one_processs_until_that_ends(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "deep" / "lock")
    assert not lock.is_held
    assert lock.holder is None
    with held(lock) as process:
        assert lock.is_held
        assert not lock.acquire(STARTING)
        assert lock.holder == (process.pid, READY)
    assert not lock.is_held
    assert lock.holder == (process.pid, READY), "a killed process leaves its name"
    assert lock.acquire(STARTING)
    assert lock.acquire(READY)
    lock.release()
    assert lock.holder is None
    assert not lock.is_held


def test_a_missing_process_is_started_after_a_pause_that_doubles_while_none_comes(tmp_path: Path) -> None:
    keeper = SpareKeeper(tmp_path, 1, lambda: None)
    now_s, pauses = 100.0, []
    for _ in range(9):
        pauses.append(seconds_until_due(keeper, now_s))
        now_s += pauses[-1]
    assert pauses[:4] == [PAUSE_S, RETRY_PAUSE_S, 2 * RETRY_PAUSE_S, 4 * RETRY_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    with held(slots(tmp_path)[0], STARTING):
        assert not any(keeper.is_due(now_s + s) for s in range(2000))
    # It died before it was ready: the next one is not started any sooner.
    assert seconds_until_due(keeper, now_s + 2000) > LONGEST_PAUSE_S / 2
    with held(slots(tmp_path)[0], READY):
        assert not any(keeper.is_due(now_s + 4000 + s) for s in range(2000))
    assert seconds_until_due(keeper, now_s + 6000) <= PAUSE_S


def test_one_worker_of_a_node_is_the_keeper_and_another_follows_it(tmp_path: Path) -> None:
    second = SpareKeeper(tmp_path, 1, lambda: None)
    with held(keeper_lock(tmp_path)):
        assert not any(second.is_due(s) for s in range(100))
    assert seconds_until_due(second, 100.0) == PAUSE_S
    second.close()
    assert seconds_until_due(SpareKeeper(tmp_path, 1, lambda: None), 200.0) == PAUSE_S


def test_as_many_are_kept_as_are_asked_for(tmp_path: Path) -> None:
    keeper = SpareKeeper(tmp_path, 2, lambda: None)
    with held(slots(tmp_path)[0]):
        now_s = seconds_until_due(keeper, 0.0)
        with held(slots(tmp_path)[1]):
            assert not any(keeper.is_due(now_s + s) for s in range(2000))


async def test_what_fails_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError("no such call")

    monkeypatch.setattr("lorafleet.cluster.worker.spare_keeper.LOOK_S", 0.001)
    keeper = SpareKeeper(tmp_path, 1, fail)
    monkeypatch.setattr(keeper, "is_due", lambda now_s: True)
    task = asyncio.create_task(keeper.run())
    await until(lambda: len(calls) > 3)
    task.cancel()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such call" in caplog.text


@contextmanager
def guard(folder: Path, given: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in reserve, which is given to a worker once the file `given` is there."""
    command = [sys.executable, "-c", SPARE, str(folder), str(given)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_spare_process_ends_without_a_keeper_and_stays_with_one(tmp_path: Path) -> None:
    keeper, given = keeper_lock(tmp_path / "kept"), tmp_path / "given"
    assert keeper.acquire(READY)
    [slot, *_] = slots(tmp_path / "kept")
    with guard(tmp_path / "kept", given) as kept, guard(tmp_path / "alone", given) as alone:
        assert alone.communicate(timeout=60)[0] == ""
        assert kept.poll() is None
        assert slot.holder == (kept.pid, READY)
        assert slot.is_held
        keeper.release()
        assert kept.communicate(timeout=60)[0] == ""
    assert not slot.is_held


async def test_a_spare_process_that_is_given_to_a_worker_leaves_its_slot(tmp_path: Path) -> None:
    keeper, given = keeper_lock(tmp_path), tmp_path / "given"
    assert keeper.acquire(READY)
    with guard(tmp_path, given) as process:
        await until(lambda: slots(tmp_path)[0].is_held)
        given.touch()
        assert process.communicate(timeout=60)[0] == "given\n"
    assert all(slot.holder is None for slot in slots(tmp_path))


@pytest.mark.parametrize(("is_killed", "patience_s"), [(True, PATIENCE_S), (False, LEAVE_S)])
def test_it_waits_longer_after_a_keeper_that_was_killed_and_always_ends_its_imports(
    is_killed: bool, patience_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, imported_s = 0.0, 500.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    if is_killed:
        with held(keeper_lock(tmp_path)):
            pass
    monkeypatch.setattr(spare_process, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=sleep))
    monkeypatch.setattr(ray_internals, "is_actor", lambda: False)
    is_ready = threading.Event()
    monkeypatch.setattr(is_ready, "is_set", lambda: now_s >= imported_s)
    monkeypatch.setattr(spare_process, "os", SimpleNamespace(_exit=sys.exit))
    with pytest.raises(SystemExit):
        spare_process._guard(tmp_path, is_ready)
    assert imported_s + patience_s <= now_s <= imported_s + patience_s + 2 * LOOK_S


@pytest.mark.parametrize(
    ("is_spare", "has_seen", "is_refused"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_only_a_process_in_reserve_prepares_and_none_that_has_seen_the_gpus(
    is_spare: bool, has_seen: bool, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded: list[Path] = []
    for name, value in {
        "is_spare_process": is_spare,
        "folder_of_environment": tmp_path,
        "name_process": None,
    }.items():
        monkeypatch.setattr(ray_internals, name, lambda *_, value=value: value)
    monkeypatch.setattr(spare_process, "has_seen_gpus", lambda: has_seen)
    monkeypatch.setattr(spare_process, "_guard", lambda folder, is_ready: guarded.append(folder))
    with pytest.raises(RuntimeError, match="initialised CUDA") if is_refused else nullcontext():
        spare_process.prepare()
    assert guarded == [tmp_path] * is_spare


@pytest.mark.slow
def test_with_its_imports_behind_it_a_process_can_still_be_given_any_gpu() -> None:
    """CUDA reads once which GPUs a process may see, and Ray says it only when it gives the process to a worker."""
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "False True\n", run.stderr
