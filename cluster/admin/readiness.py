"""Whether the service is ready, as an ingress tells it: the controller's word, and its last one while it is away."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from lorafleet.cluster.errors import ControllerUnavailable


class Judge(Protocol):
    """The controller."""

    async def not_ready(self) -> str | None:
        """Why the service is not ready; None: it is. Raises ControllerUnavailable."""
        ...


class Readiness:
    """Answers `/readyz`."""

    def __init__(self, controller: Judge, live_workers: Callable[[], Collection[str]]) -> None:
        self._controller = controller
        self._live_workers = live_workers
        self._was_ready = False

    async def not_ready(self) -> str | None:
        """Why the service is not ready; None: it is. Generating needs no controller, so its absence changes nothing."""
        try:
            reason = await self._controller.not_ready()
        except ControllerUnavailable:
            if not self._was_ready:
                return "the controller is away; it is being started"
            return None if self._live_workers() else "no worker is up"
        self._was_ready = reason is None
        return reason
