"""What `/readyz` says while the controller is away, new, or stands still."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from lorafleet.cluster.admin import readiness
from lorafleet.cluster.admin.readiness import SHARED_S, Readiness
from lorafleet.cluster.errors import ControllerUnavailable
from lorafleet.cluster.wire import StoreProblem
from tests.support.clock import Clock


@dataclass
class Judge:
    """A controller that says what it is told to."""

    reason: str | Exception | None = "adapters are being loaded"
    found: list[str] = field(default_factory=list)
    is_away: bool = False
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    num_calls: int = 0

    def __post_init__(self) -> None:
        self.may_answer.set()

    async def not_ready(self) -> str | None:
        await self._call()
        assert not isinstance(self.reason, Exception)
        return self.reason

    async def problems(self) -> tuple[StoreProblem, ...]:
        await self._call()
        return tuple(StoreProblem(code, "folder", "", code) for code in self.found)

    async def _call(self) -> None:
        self.num_calls += 1
        await self.may_answer.wait()
        if self.is_away:
            raise ControllerUnavailable("away")


AWAY = "the controller is away; it is being started"


async def test_readiness_outlives_the_controller() -> None:
    judge, live = Judge(is_away=True), {"w0"}
    readiness = Readiness(judge, lambda: live)
    assert await readiness.not_ready() == AWAY
    judge.is_away = False
    assert await readiness.not_ready() == "adapters are being loaded"
    judge.reason = None
    assert await readiness.not_ready() is None
    judge.is_away = True
    assert await readiness.not_ready() is None
    live.clear()
    assert await readiness.not_ready() == "no worker is up"


async def test_a_new_controller_that_has_not_looked_yet_changes_nothing() -> None:
    judge = Judge(reason=None)
    readiness = Readiness(judge, lambda: {"w0"})
    assert await readiness.not_ready() is None
    judge.reason = "adapters are being loaded"
    assert await readiness.not_ready() is None


async def test_a_controller_that_stands_still_holds_up_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "ANSWER_S", 0.05)
    judge, clock = Judge(reason=None, found=["store_full"]), Clock()
    probe = Readiness(judge, lambda: {"w0"}, clock=clock)
    judge.may_answer.clear()
    assert await probe.not_ready() == AWAY
    judge.may_answer.set()
    assert await probe.not_ready() is None
    assert await probe.problems() == {"store_full": 1}
    judge.may_answer.clear()
    judge.found.append("store_damaged")
    clock.now_s += SHARED_S
    assert await probe.problems() == {"store_full": 1}, "as it was said last"
    judge.may_answer.set()
    assert await probe.problems() == {"store_full": 1, "store_damaged": 1}
    judge.is_away = True
    clock.now_s += SHARED_S
    assert await probe.problems() == {}


async def test_many_probes_are_one_question() -> None:
    judge = Judge(reason=None, found=["store_full"])
    probe = Readiness(judge, lambda: {"w0"}, clock=Clock())
    assert await asyncio.gather(*(probe.problems() for _ in range(100))) == [{"store_full": 1}] * 100
    assert judge.num_calls == 1
