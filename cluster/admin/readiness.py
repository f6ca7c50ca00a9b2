"""Readiness of the service as an ingress reports it: the controller's answer, until it has been ready once.

From then on it is ready while a worker is up, for requests need no controller. Anybody may ask, as often as they like.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol

from lorafleet.cluster.errors import ControllerUnavailable, ServiceUnavailable
from lorafleet.cluster.wire import StoreProblem

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""How often a starting ingress asks the controller."""
ANSWER_S = 1.0
"""How long a probe waits for the controller. What it says later is told the next time."""
SHARED_S = 0.5
"""How old the count of problems may be."""


class Judge(Protocol):
    """The controller."""

    async def not_ready(self) -> str | None:
        """Return why the service is not ready; None if it is. Raises ControllerUnavailable."""
        ...

    async def problems(self) -> tuple[StoreProblem, ...]:
        """Return the faults of the store's state folder. Raises ServiceUnavailable."""
        ...


class Readiness:
    """Answers `/readyz`."""

    def __init__(
        self,
        controller: Judge,
        live_workers: Callable[[], Collection[str]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._controller = controller
        self._live_workers = live_workers
        self._clock = clock
        self._was_ready = False
        self._found: Counter[str] = Counter()
        self._asking: asyncio.Task[None] | None = None
        self._asked_s = -SHARED_S

    async def run(self) -> None:
        """Ask until the service has been ready once, so that this ingress knows it should the controller die."""
        while not self._was_ready:
            try:
                await self.not_ready()
            except Exception:
                logger.exception("the controller could not say whether the service is ready")
            await asyncio.sleep(POLL_S)

    async def not_ready(self) -> str | None:
        """Return why the service is not ready; None if it is. A lost controller, or a new one, changes nothing."""
        if self._was_ready:
            return None if self._live_workers() else "no worker is up"
        try:
            async with asyncio.timeout(ANSWER_S):
                reason = await self._controller.not_ready()
        except (ControllerUnavailable, TimeoutError):
            return "the controller is away; it is being started"
        self._was_ready = reason is None
        return reason

    async def problems(self) -> Counter[str]:
        """Codes of what is wrong with the store's state folder, and how often; none while nobody can say."""
        if (self._asking is None or self._asking.done()) and self._clock() - self._asked_s >= SHARED_S:
            self._asked_s = self._clock()
            self._asking = asyncio.create_task(self._ask_for_problems())
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=ANSWER_S)
        return self._found

    async def _ask_for_problems(self) -> None:
        try:
            self._found = Counter(problem.code for problem in await self._controller.problems())
        except ServiceUnavailable:
            self._found = Counter()
        except Exception:
            logger.exception("the controller could not say what is wrong with the store's state folder")
