"""The newest `user_config` reaches the controller, also one that takes over, and one that was away."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lorafleet.cluster.admin import relay as relay_module
from lorafleet.cluster.admin.relay import UserConfigRelay
from lorafleet.cluster.errors import ControllerUnavailable
from tests.support.wait import until


class Recipient:
    """A controller that may be away, and forgets when it is replaced."""

    def __init__(self) -> None:
        self.stamp = 0
        self.taken: list[object] = []
        self.is_away = False

    async def user_config_stamp(self) -> int:
        if self.is_away:
            raise ControllerUnavailable("away")
        return self.stamp

    async def take_user_config(self, stamp: int, user_config: object) -> None:
        assert stamp > self.stamp
        self.stamp = stamp
        self.taken.append(user_config)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "PERIOD_S", 0.001)
    monkeypatch.setattr(relay_module, "RETRY_S", 0.001)


@contextmanager
def running(relay: UserConfigRelay) -> Iterator[None]:
    task = asyncio.create_task(relay.run())
    try:
        yield
    finally:
        task.cancel()


async def test_an_ingress_without_a_user_config_says_so_once() -> None:
    recipient = Recipient()
    with running(UserConfigRelay(recipient)):
        await until(lambda: recipient.taken == [None])
        await asyncio.sleep(0.02)
    assert recipient.taken == [None]


async def test_a_new_controller_is_told_again() -> None:
    recipient = Recipient()
    relay = UserConfigRelay(recipient)
    relay.take({"adapters": []})
    with running(relay):
        await until(lambda: recipient.taken == [{"adapters": []}])
        recipient.is_away = True
        await asyncio.sleep(0.01)
        recipient.stamp, recipient.taken, recipient.is_away = 0, [], False
        await until(lambda: recipient.taken == [{"adapters": []}])


async def test_an_ingress_that_drains_hands_on_nothing() -> None:
    recipient = Recipient()
    is_serving = [False]
    relay = UserConfigRelay(recipient, is_serving=lambda: is_serving[0])
    with running(relay):
        relay.take("late")
        await asyncio.sleep(0.02)
        assert recipient.taken == []
        is_serving[0] = True
        await until(lambda: recipient.taken == ["late"])


async def test_an_older_ingress_does_not_bring_back_what_was_replaced() -> None:
    recipient = Recipient()
    clock = itertools.count(1)
    old = UserConfigRelay(recipient, clock_ns=lambda: next(clock))
    new = UserConfigRelay(recipient, clock_ns=lambda: next(clock))
    old.take("old")
    new.take("new")
    with running(new):
        await until(lambda: recipient.taken == ["new"])
        with running(old):
            await asyncio.sleep(0.02)
    assert recipient.taken == ["new"]
