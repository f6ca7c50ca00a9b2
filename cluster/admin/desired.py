"""Brings the names of the store in line with configuration: `adapters.preload`, and the ingress's `user_config`.

The `user_config` lies in the store, with a generation. So an ingress that shuts down cannot bring back an older
one, and a new controller continues from it. Changes are applied in the background and retried until they hold.

A name that came from configuration and is no longer in it is deleted. A name that the admin plane or a request brought
is left alone, even where configuration has it too. Exception: a `user_config` that changes a name in a running service
replaces it. A refused one changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pydantic import ValidationError

from lorafleet.adapter_store.errors import StaleGeneration
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.records import DesiredRecord, DesiredState
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.config import DesiredAdapter, UserConfig
from lorafleet.cluster.errors import NameTaken, describe
from lorafleet.cluster.validation import refusal_of

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""How often to look whether workers came or went."""
RETRY_S = 1.0
MAX_RETRY_S = 30.0
START_S = 120.0
"""How long the first round waits for the last workers once one is there."""
MAX_AT_ONCE = 4


class DesiredStore(Protocol):
    """The store of the desired state. Every method raises StoreUnavailable."""

    async def desired(self) -> DesiredState: ...

    async def set_desired(self, adapters: tuple[DesiredRecord, ...], generation: int) -> DesiredState: ...


class DesiredSet:
    """The adapters that the configuration asks for, and how many of them are in place."""

    def __init__(
        self,
        rollout: Rollout,
        preload: Sequence[DesiredAdapter],
        *,
        store: DesiredStore,
        num_workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rollout = rollout
        self._store = store
        self.generation = 0
        """Of the newest `user_config` that was taken or refused; 0 if there was none."""
        self._is_complete = True
        self._preload = {adapter.name: adapter for adapter in preload}
        self._num_workers = num_workers
        self._clock = clock
        self._user: dict[str, DesiredAdapter] = {}
        self._has_user_config = False
        self._refusal: str | None = None
        self._news: set[str] = set()
        self._done: dict[str, DesiredAdapter] = {}
        self._changed = asyncio.Event()
        self._has_applied = False
        self._is_preloaded = False
        self._problems: dict[str, str] = {}

    async def resume(self) -> bool:
        """Go on from the state in the store; False if there is none yet. Raises StoreUnavailable."""
        state = await self._store.desired()
        if state.generation <= self.generation:
            return self.generation > 0
        self.generation = state.generation
        self._is_complete = state.is_complete
        self._has_user_config = True
        self.set_user_config(UserConfig.model_construct(adapters=tuple(map(_adapter_of, state.adapters))))
        return True

    async def take_user_config(self, generation: int, user_config: object) -> None:
        """Take a `user_config` of this generation, unless there is a newer one. Raises StoreUnavailable.

        A refused one is logged, and the former one stays in force, also one of a service that has been stopped since:
        Serve would take the service down for an error.
        """
        if generation <= self.generation:
            return
        try:
            config = await asyncio.to_thread(UserConfig.model_validate, user_config)
        except ValidationError as error:
            if not self._has_user_config:
                await self.resume()
            self.generation = max(generation, self.generation)
            self._refusal = refusal_of(error.errors(include_url=False)).message
            logger.error("user_config is refused and changes nothing: %s", self._refusal)
            return
        try:
            await self._store.set_desired(tuple(map(_record_of, config.adapters)), generation)
        except StaleGeneration:
            logger.warning("a user_config is older than the one in the store, and changes nothing")
            await self.resume()
            return
        if generation > self.generation:
            self.generation = generation
            self._is_complete = True
            self._refusal = None
            self._has_user_config = True
            self.set_user_config(config)

    def set_user_config(self, config: UserConfig) -> None:
        """Take a `user_config`; it is applied soon. The one that a service starts with says nothing new."""
        wanted = {adapter.name: adapter for adapter in config.adapters}
        if self._has_applied:
            self._news |= {name for name, adapter in wanted.items() if self._user.get(name) != adapter}
        self._user = wanted
        self._changed.set()

    async def not_ready(self) -> str | None:
        """Return why the service is not ready yet; None if it is."""
        if not await self._rollout.worker_ids():
            return "no worker is up; if one cannot start, `serve status` says why"
        if self._is_at_a_loss:
            return f"user_config is refused: {self._refusal}"
        if not self._is_preloaded:
            problems = [problem for name, problem in sorted(self._problems.items()) if name in self._preload]
            return problems[0] if problems else "adapters are being loaded"
        return None

    @property
    def refusal(self) -> str | None:
        """The reason for which the newest `user_config` was refused; None if it was not."""
        return self._refusal

    @property
    def _is_at_a_loss(self) -> bool:
        """True if the only `user_config` that there has ever been was refused."""
        return self._refusal is not None and not self._has_user_config

    async def run(self) -> None:
        """Apply what is wanted when it changes and when workers come and go, until cancelled."""
        await self._await_workers()
        retry_s = RETRY_S
        while True:
            self._changed.clear()
            workers = await self._rollout.worker_ids()
            await self.apply()
            retry_s = min(2 * retry_s, MAX_RETRY_S) if self._problems else RETRY_S
            again_s = self._clock() + (retry_s if self._problems else math.inf)
            while self._clock() < again_s and not self._changed.is_set():
                if await self._rollout.worker_ids() != workers:
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), POLL_S)

    async def apply(self) -> None:
        """One round. What went wrong is logged and kept; it never raises.

        What has been in place once is only made resident again: an admin may have changed or deleted it since. What an
        admin deleted stays away, unless a new `user_config` has it.
        """
        self._has_applied = True
        wanted, news = self._preload | self._user, frozenset(self._news)
        try:
            current = {record.name: record for record in await self._rollout.records()}
            taken_down = await self._rollout.taken_down() - news
            num_holders = await self._rollout.num_holders()
            num_workers = len(await self._rollout.worker_ids())
        except Exception as error:
            self._problems = {"": _explain("the adapter store", error)}
            return
        stale = [name for name, adapter in current.items() if adapter.origin == "config" and name not in wanted]
        if self._is_at_a_loss or not self._is_complete:
            stale = []  # who knows whether they are
        due, cold = [], []
        for adapter in wanted.values():
            if adapter.name not in taken_down and self._is_due(adapter, current):
                due.append(adapter)
            elif adapter.name in current:
                warm = num_workers if adapter.warm == "all" else min(adapter.warm, num_workers)
                if num_holders[current[adapter.name].version] < warm:
                    cold.append(adapter)
        limit = asyncio.Semaphore(MAX_AT_ONCE)
        self._problems = {}
        await asyncio.gather(
            *(self._try(limit, name, self._rollout.drop, name) for name in stale),
            *(self._try(limit, adapter.name, self._put, adapter, current.get(adapter.name)) for adapter in due),
            *(self._try(limit, adapter.name, self._rollout.warm, adapter.name, adapter.warm) for adapter in cold),
        )
        self._done = {name: adapter for name, adapter in wanted.items() if name not in self._problems}
        self._news -= news - self._problems.keys()  # others came during the round
        if not any(name in self._problems for name in self._preload):
            self._is_preloaded = True

    def _is_due(self, adapter: DesiredAdapter, current: Mapping[str, NameRecord]) -> bool:
        if self._done.get(adapter.name) == adapter:
            return False
        named = current.get(adapter.name)
        if named is None:
            return True
        if named.origin != "config":
            return adapter.name in self._news
        return (named.source, named.key, named.pinned) != (adapter.source, adapter.key, adapter.pinned)

    async def _put(self, adapter: DesiredAdapter, judged: NameRecord | None) -> None:
        with contextlib.suppress(NameTaken):  # an admin has changed it since it was judged
            await self._rollout.put(
                adapter.name,
                source=adapter.source,
                key=adapter.key,
                pinned=adapter.pinned,
                warm=adapter.warm,
                origin="config",
                seen=0 if judged is None else judged.generation,
            )

    async def _try(self, limit: asyncio.Semaphore, name: str, change: Callable[..., object], *args: object) -> None:
        async with limit:
            try:
                await change(*args)  # type: ignore[misc]
            except Exception as error:
                self._problems[name] = _explain(f"adapter {name!r}", error)

    async def _await_workers(self) -> None:
        since_s: float | None = None
        while (num_workers := len(await self._rollout.worker_ids())) < self._num_workers:
            now_s = self._clock()
            since_s = since_s if since_s is not None or not num_workers else now_s
            if since_s is not None and now_s - since_s > START_S:
                logger.warning(
                    "only %d of %d workers are up; adapters are loaded there", num_workers, self._num_workers
                )
                return
            await asyncio.sleep(0.1)


def _record_of(adapter: DesiredAdapter) -> DesiredRecord:
    return DesiredRecord(adapter.name, adapter.source, adapter.key, adapter.pinned, adapter.warm)


def _adapter_of(record: DesiredRecord) -> DesiredAdapter:
    return DesiredAdapter(
        name=record.name, source=record.source, key=record.key, pinned=record.pinned, warm=record.warm
    )


def _explain(what: str, error: Exception) -> str:
    reply = describe(error)
    problem = f"{what}: {reply.message} ({reply.code})"
    logger.warning("configuration is not in place yet: %s", problem)
    return problem
