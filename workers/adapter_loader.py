"""Brings adapters in: fetches weights from the store, reserves pages, uploads them beside the step loop, publishes them
between two steps. Also follows the store's word on which versions have a name and which are pinned.

Everything but the fetching and uploading happens on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights
from lorafleet.workers.errors import AdapterUnavailable, EngineFailed
from lorafleet.workers.memory.adapter_pool import AdapterPool, Allocation, UploadedAdapter
from lorafleet.workers.memory.residency import Residency
from lorafleet.workers.sequence import AdapterReadiness, Sequence
from lorafleet.workers.stats import MAX_OBSERVATIONS

logger = logging.getLogger(__name__)

NUM_THREADS = 4
"""Fetches and uploads at once."""
REFRESH_S = 0.2
"""How old `resident_versions` may be."""
FORGET_S = 60.0
"""Fetched weights that nobody has asked for in this long are let go."""


@dataclass(frozen=True, slots=True)
class _Waiter:
    """Someone who asked for a version by name, not by a request."""

    future: Future[None]
    hold_s: float
    pinned: bool


@dataclass(slots=True)
class _Load:
    """A version on its way: being fetched, then waiting for room, then being uploaded."""

    wanted_s: float
    asked_s: float
    """When a request or a waiter last asked for it."""
    weights: AdapterWeights | None = None
    allocation: Allocation | None = None
    waiters: list[_Waiter] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Hold:
    version: str
    expires_s: float


class AdapterLoader:
    """The adapter life of one worker. `fetch` may block; it is called on a thread of the loader's own.

    `on_gone` is told of versions that lost their last name and their last user.
    """

    def __init__(
        self,
        pool: AdapterPool,
        residency: Residency,
        fetch: Callable[[str], AdapterWeights],
        *,
        on_gone: Callable[[str], None] = lambda version: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_progress: Callable[[], None] = lambda: None
        """Called from any thread when `publish_ready` has something to do, or `take_failures` something to tell."""
        self.resident_versions: tuple[str, ...] = ()
        """Versions that are resident; may be read from any thread, and be `REFRESH_S` old."""
        self.load_s: deque[float] = deque(maxlen=MAX_OBSERVATIONS)
        """From the first wish for a version to its publication."""
        self._pool = pool
        self._residency = residency
        self._fetch = fetch
        self._on_gone = on_gone
        self._clock = clock
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="lorafleet-load")
        self._loads: dict[str, _Load] = {}
        self._arrived: deque[tuple[str, AdapterWeights | UploadedAdapter | Exception]] = deque()
        self._failures: dict[str, Exception] = {}
        self._holds: list[_Hold] = []
        self._fading: set[str] = set()
        """Versions without a name that may still be in use."""
        self._refreshed_s = -REFRESH_S

    # --- for requests ---

    def want(self, version: str) -> None:
        """Begin to fetch a version, unless it is here or on its way."""
        if version in self._residency or version in self._loads:
            return
        now = self._clock()
        self._loads[version] = _Load(wanted_s=now, asked_s=now)
        self._run(version, lambda: self._checked(self._fetch(version)))

    def try_ready(self, sequence: Sequence) -> AdapterReadiness:
        """Take the sequence's lease as soon as its version has pages. See `AdapterGate`."""
        version = sequence.version
        assert version is not None
        if sequence.lease is None:
            sequence.lease = self._residency.try_acquire(version)
        if sequence.lease is None:
            load = self._loads.get(version)
            if load is None:
                self.want(version)
                return AdapterReadiness.LOADING
            load.asked_s = self._clock()
            if load.weights is None:
                return AdapterReadiness.LOADING
            if not self._try_upload(version, load):
                return AdapterReadiness.NO_ROOM
            sequence.lease = self._residency.acquire(version)
        return AdapterReadiness.READY if sequence.lease.is_ready else AdapterReadiness.LOADING

    def is_coming(self, version: str) -> bool:
        """See `AdapterGate`."""
        return self._residency.state(version) == "loading"

    def take_failures(self) -> dict[str, Exception]:
        """Versions that could not be loaded since the last call. The caller ends the requests that wait for them, which
        releases their leases, and then calls `forget`.
        """
        failures, self._failures = self._failures, {}
        return failures

    def forget(self, version: str) -> None:
        """Give back what a failed load had reserved."""
        load = self._loads.pop(version)
        if load.allocation is not None:
            self._residency.abandon(version)

    # --- for the cluster ---

    def make_resident(self, version: str, *, hold_s: float, pinned: bool) -> Future[None]:
        """Load a version whether or not a request wants it. Fails with NoRoomError at once if it cannot fit now."""
        waiter = _Waiter(Future(), hold_s, pinned)
        waiter.future.set_running_or_notify_cancel()  # from here on a caller that gives up cannot cancel it
        state = self._residency.state(version)
        if state is not None and state != "loading" and version not in self._loads:
            self._settle(version, waiter)
            return waiter.future
        self.want(version)
        load = self._loads[version]
        load.asked_s = self._clock()
        load.waiters.append(waiter)
        if load.weights is not None:
            self._upload_for_waiters(version, load)
        return waiter.future

    def release_hold(self, version: str) -> None:
        """End the hold of one `make_resident`; none is fine, it may have run out."""
        for hold in self._holds:
            if hold.version == version:
                self._holds.remove(hold)
                self._residency.unhold(version)
                return

    def reconcile(self, named: Mapping[str, bool], asked: Collection[str] | None = None) -> None:
        """Follow the store: pin what is pinned, let go of what has lost its name.

        named: versions with a name, and whether they are pinned. asked: what the store was asked about; None: all.
        """
        for use in self._residency.snapshot().adapters:
            pinned = named.get(use.version)
            if pinned is None:
                if asked is not None and use.version not in asked:  # it came since
                    continue
                load = self._loads.get(use.version)
                is_awaited = load is not None and bool(load.waiters)  # a roll-out names it once it is everywhere
                if use.state != "retired" and use.holds == 0 and not is_awaited:
                    self._residency.retire(use.version)
                    self._fading.add(use.version)
                continue
            if use.state == "retired":
                self._residency.restore(use.version)
                self._fading.discard(use.version)
            if pinned and not use.pinned:
                self._residency.pin(use.version)
            elif use.pinned and not pinned:
                self._residency.unpin(use.version)
        for version, pinned in named.items():
            if pinned and version not in self._residency:
                self.make_resident(version, hold_s=0.0, pinned=True).add_done_callback(_log_failure)

    def estimate(self, manifest: AdapterManifest) -> tuple[int, tuple[str, ...]]:
        """Pages the adapter would take and versions it would evict, now. Raises NoRoomError."""
        if manifest.version in self._residency:
            return self._pool.num_pages(manifest), ()
        victims = self._residency.victims(manifest)
        if victims is None:
            raise self._residency.no_room(manifest)
        return self._pool.num_pages(manifest), victims

    def close(self) -> None:
        """End the threads; loads under way are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for load in self._loads.values():
            _fail_waiters(load, EngineFailed("the worker has ended"))

    # --- between steps ---

    def publish_ready(self) -> None:
        """Take in what the threads have done: fetched weights wait for room, uploaded adapters become resident."""
        while self._arrived:
            version, item = self._arrived.popleft()
            load = self._loads[version]
            if isinstance(item, Exception):
                self._fail(version, load, item)
            elif isinstance(item, AdapterWeights):
                load.weights = item
                if load.waiters:
                    self._upload_for_waiters(version, load)
            else:
                self._publish(version, load, item)
        now = self._clock()
        for hold in [hold for hold in self._holds if hold.expires_s <= now]:
            self._holds.remove(hold)
            self._residency.unhold(hold.version)
        if now - self._refreshed_s >= REFRESH_S:
            self._refreshed_s = now
            self._forget_unasked(now)
            for version in [version for version in self._fading if version not in self._residency]:
                self._fading.remove(version)
                self._on_gone(version)
            self.resident_versions = tuple(
                use.version for use in self._residency.snapshot().adapters if use.state == "resident"
            )

    def _forget_unasked(self, now: float) -> None:
        """The requests that wanted them were aborted before there was room."""
        for version, load in list(self._loads.items()):
            is_idle = load.weights is not None and load.allocation is None and version not in self._failures
            if is_idle and not load.waiters and now - load.asked_s > FORGET_S:
                del self._loads[version]

    def _publish(self, version: str, load: _Load, uploaded: UploadedAdapter) -> None:
        # The waiters' holds and pins come before the version could be found unused.
        del self._loads[version]
        self._residency.publish(uploaded)
        self.load_s.append(self._clock() - load.wanted_s)
        for waiter in load.waiters:
            self._settle(version, waiter)
        self._refreshed_s = -REFRESH_S

    def _settle(self, version: str, waiter: _Waiter) -> None:
        if version not in self._residency:
            # Retired while it loaded and gone with its publication: whoever waits still wants it.
            self.want(version)
            self._loads[version].waiters.append(waiter)
            return
        self._residency.restore(version)
        if waiter.pinned:
            self._residency.pin(version)
        if waiter.hold_s > 0:
            self._residency.hold(version)
            self._holds.append(_Hold(version, self._clock() + waiter.hold_s))
        waiter.future.set_result(None)

    def _upload_for_waiters(self, version: str, load: _Load) -> None:
        if load.allocation is not None or self._try_upload(version, load):
            return
        assert load.weights is not None
        _fail_waiters(load, self._residency.no_room(load.weights.manifest))

    def _try_upload(self, version: str, load: _Load) -> bool:
        """Reserve pages and begin to write them; False when there is no room now."""
        weights = load.weights
        assert weights is not None
        allocation = self._residency.try_reserve(weights.manifest)
        if allocation is None:
            if not self._residency.fits_beside_pinned(weights.manifest):
                # Waiting would not help: it fits only if something is unpinned or the pool grows.
                self._fail(version, load, self._residency.no_room(weights.manifest))
            return False
        load.allocation = allocation
        self._failures.pop(version, None)  # there was no room before
        self._run(version, lambda: self._pool.upload(allocation, weights))
        return True

    def _checked(self, weights: AdapterWeights) -> AdapterWeights:
        """The weights. Raises AdapterRefused when this worker's memory cannot serve them right."""
        manifest = weights.manifest
        absorbed = sorted(module.name for module in manifest.modules if module.name in self._pool.absorbed)
        if manifest.invocation and absorbed:
            raise AdapterRefused(
                "unsupported_field",
                f"alora_invocation_tokens is set, and LoRA is on {absorbed[0]}: the compressed cache of latents "
                "serves one adapter of it for all of a sequence. Set worker.latent_cache to expanded, or train without",
                "alora_invocation_tokens",
            )
        return weights

    def _fail(self, version: str, load: _Load, error: Exception) -> None:
        self._failures[version] = error
        _fail_waiters(load, error)
        self.on_progress()

    def _run(self, version: str, work: Callable[[], AdapterWeights | UploadedAdapter]) -> None:
        def run() -> None:
            try:
                self._arrived.append((version, work()))
            except Exception as error:
                self._arrived.append((version, _presentable(error)))
            self.on_progress()

        self._threads.submit(run)


def _fail_waiters(load: _Load, error: Exception) -> None:
    waiters, load.waiters = load.waiters, []
    for waiter in waiters:
        waiter.future.set_exception(error)


def _presentable(error: Exception) -> Exception:
    """Errors with a stable code as they are; others as what they mean for a request."""
    if hasattr(error, "code"):
        return error
    logger.warning("an adapter could not be loaded", exc_info=error)
    return AdapterUnavailable("the adapter's weights cannot be fetched now")


def _log_failure(future: Future[None]) -> None:
    if future.exception() is not None:
        logger.warning("a pinned adapter is not resident: %s", future.exception())
