"""Hands the ingress's `user_config` on to the controller, and again to each controller that takes over.

Serve gives a `user_config` to each replica of the ingress when it starts and when the config changes. The newest one
wins: each carries the time at which its ingress got it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from lorafleet.cluster.errors import ServiceUnavailable

logger = logging.getLogger(__name__)

PERIOD_S = 2.0
"""How often to look whether the controller has the config: how long a new controller may be without it."""
RETRY_S = 0.2
"""How soon to ask a controller again that was away."""


class Recipient(Protocol):
    """The controller."""

    async def user_config_stamp(self) -> int:
        """The stamp of the newest `user_config` that it was given; 0 if none."""
        ...

    async def take_user_config(self, stamp: int, user_config: object) -> None:
        """Take a `user_config`, unless it has a newer one."""
        ...


class UserConfigRelay:
    """Keeps the controller informed, until cancelled. An ingress without a `user_config` says so too."""

    def __init__(
        self,
        controller: Recipient,
        *,
        is_serving: Callable[[], bool] = lambda: True,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """is_serving: False while the ingress is on its way out; then it hands on nothing."""
        self._controller = controller
        self._is_serving = is_serving
        self._clock_ns = clock_ns
        self._stamp = clock_ns()
        self._user_config: object = None
        self._changed = asyncio.Event()

    def take(self, user_config: object) -> None:
        """Hand this on from now on."""
        self._stamp = max(self._clock_ns(), self._stamp + 1)
        self._user_config = user_config
        self._changed.set()

    async def run(self) -> None:
        """Hand on what is newer than what the controller has, again and again."""
        while True:
            self._changed.clear()
            pause_s = PERIOD_S
            try:
                if self._is_serving() and await self._controller.user_config_stamp() < self._stamp:
                    await self._controller.take_user_config(self._stamp, self._user_config)
            except ServiceUnavailable:
                pause_s = RETRY_S
            except Exception:
                logger.exception("user_config could not be handed to the controller")
            try:
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
