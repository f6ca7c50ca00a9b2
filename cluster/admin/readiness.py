"""Readiness of the service as an ingress reports it: the controller's answer, or its last one while it is away."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol

from lorafleet.cluster.errors import ControllerUnavailable, ServiceUnavailable
from lorafleet.cluster.wire import StoreProblem

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""How often a starting ingress asks the controller."""


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

    def __init__(self, controller: Judge, live_workers: Callable[[], Collection[str]]) -> None:
        self._controller = controller
        self._live_workers = live_workers
        self._was_ready = False

    async def run(self) -> None:
        """Ask until the service has been ready once, so that this ingress knows it should the controller die."""
        while not self._was_ready:
            try:
                await self.not_ready()
            except Exception:
                logger.exception("the controller could not say whether the service is ready")
            await asyncio.sleep(POLL_S)

    async def not_ready(self) -> str | None:
        """Return why the service is not ready; None if it is. A lost controller changes nothing."""
        try:
            reason = await self._controller.not_ready()
        except ControllerUnavailable:
            if not self._was_ready:
                return "the controller is away; it is being started"
            return None if self._live_workers() else "no worker is up"
        self._was_ready = reason is None
        return reason

    async def problems(self) -> Counter[str]:
        """Codes of what is wrong with the store's state folder, and how often; none while nobody can say."""
        try:
            return Counter(problem.code for problem in await self._controller.problems())
        except ServiceUnavailable:
            return Counter()
