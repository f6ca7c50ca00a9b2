"""Versions without a name go when nobody has used them for the grace period."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorafleet.adapter_store.errors import (
    UnknownVersion,
)
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.service import AdapterStore
from lorafleet.adapter_store.version_use import GRACE_S
from tests.adapter_store.conftest import CopyOf, load, staged_files
from tests.support.clock import Clock


async def test_versions_without_a_name_go_after_the_grace_period(
    store: AdapterStore, copy_of: CopyOf, clock: Clock, tmp_path: Path
) -> None:
    copy_of("rank4_qv")
    old = await load(store, "a")
    copy_of("rank4_qv", seed=2)
    new = await load(store, "a")
    assert await store.collect() == ()
    clock.now_s += GRACE_S
    assert await store.collect() == (old,)
    assert [path.name for path in tmp_path.glob("state/*/versions/*")] == [new]
    assert staged_files(tmp_path) == []
    with pytest.raises(UnknownVersion):
        await store.fetch(old)
    await store.fetch(new)


async def test_the_grace_period_starts_when_the_name_goes(store: AdapterStore, copy_of: CopyOf, clock: Clock) -> None:
    copy_of("rank4_qv")
    version = await load(store, "a")
    clock.now_s += 10 * GRACE_S
    await store.delete("a")
    assert await store.collect() == ()
    clock.now_s += GRACE_S
    assert await store.collect() == (version,)


async def test_what_a_worker_holds_stays(store: AdapterStore, copy_of: CopyOf, clock: Clock) -> None:
    copy_of("rank4_qv")
    version = await load(store, "a")
    await store.delete("a")
    for _ in range(3):
        clock.now_s += 0.9 * GRACE_S
        await store.reconcile("w", (version,))
        assert await store.collect() == ()
    await store.reconcile("w", ())
    assert await store.collect() == (version,)


async def test_what_a_silent_worker_held_goes(store: AdapterStore, copy_of: CopyOf, clock: Clock) -> None:
    copy_of("rank4_qv")
    version = await load(store, "a")
    await store.delete("a")
    await store.reconcile("w", (version,))
    clock.now_s += GRACE_S
    assert await store.collect() == (version,)


async def test_staging_and_fetching_count_as_use(store: AdapterStore, copy_of: CopyOf, clock: Clock) -> None:
    copy_of("rank4_qv")
    version = (await store.publish("disk", "a")).version
    for use in (lambda: store.fetch(version), lambda: store.publish("disk", "a")):
        clock.now_s += 0.9 * GRACE_S
        await use()
        assert await store.collect() == ()
    clock.now_s += GRACE_S
    assert await store.collect() == (version,)


async def test_reconciling_collects_by_itself(store: AdapterStore, copy_of: CopyOf, clock: Clock) -> None:
    copy_of("rank4_qv")
    version = (await store.publish("disk", "a")).version
    clock.now_s += GRACE_S
    await store.reconcile("w", ())
    await asyncio.gather(*store._background)
    with pytest.raises(UnknownVersion):
        await store.manifest(version)


async def test_what_was_collected_can_be_loaded_again(store: AdapterStore, copy_of: CopyOf, clock: Clock) -> None:
    copy_of("rank4_qv")
    version = (await store.publish("disk", "a")).version
    clock.now_s += GRACE_S
    assert await store.collect() == (version,)
    with pytest.raises(UnknownVersion):
        await store.flip(NameRecord("a", version, "disk", "a", False, 0, "admin"))
    assert await load(store, "a") == version


def test_grace_outlasts_a_request() -> None:
    assert GRACE_S >= 300
