"""A worker without a model: every sequence gets a token at each beat, so that all CPU is the way to the client.

`replica_class` gives the class that takes the place of `WorkerReplica` in `cluster/app.py`. Its hand-over to the event
loop, a call a step, is the real worker's.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any

from ray import cloudpickle

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.memory.residency import ResidencySnapshot
from lorafleet.workers.request import EngineRequest, GenerateDelta
from lorafleet.workers.state import AdapterPages, KVPages, WorkerState
from lorafleet.workers.stats import EngineStats
from lorafleet.workers.worker import Worker

TEXT = " word"
TOKEN_ID = 7
THREAD_NAME = "metronome"
"""As the system knows it, so that its CPU time is told from that of the worker around it."""
_PR_SET_NAME = 15


class _Beats:
    """Stands in for `workers.engine.Engine`: a token a sequence and beat, all of a beat in one hand-over."""

    def __init__(self, deliver: Callable[[list[Any]], None], beats_per_s: float, worker_id: str) -> None:
        self.stats = EngineStats()
        self.num_running = self.num_waiting = 0
        self._deliver = deliver
        self._period_s = 1 / beats_per_s
        self._worker_id = worker_id
        self._commands: deque[Callable[[], None]] = deque()
        self._made: dict[str, int] = {}
        self._requests: dict[str, EngineRequest] = {}
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        self._commands.append(lambda: self._requests.__setitem__(request.request_id, request))

    def abort(self, request_id: str) -> None:
        self._commands.append(lambda: self._end(request_id))

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._commands.append(lambda: future.set_result(function()))
        return future

    def check_health(self) -> None:
        assert self._thread.is_alive()

    def close(self) -> None:
        self._is_closing = True

    def _end(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._made.pop(request_id, None)

    def _run(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, THREAD_NAME.encode())
        due_s = time.monotonic()
        while not self._is_closing:
            while self._commands:
                self._commands.popleft()()
            deltas = [self._beat(request_id, request) for request_id, request in list(self._requests.items())]
            self.num_running = len(self._requests)
            if deltas:
                self._deliver(deltas)
                self.stats.note_step(len(deltas), len(deltas), self._period_s)
            due_s = max(due_s + self._period_s, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))

    def _beat(self, request_id: str, request: EngineRequest) -> tuple[str, GenerateDelta]:
        made = self._made.get(request_id, 0) + 1
        self._made[request_id] = made
        is_last = made >= (request.sampling.max_tokens or 16)
        if is_last:
            self._end(request_id)
        return request_id, GenerateDelta(
            index=0,
            token_ids=(TOKEN_ID,),
            text=TEXT,
            logprobs=None,
            finish_reason="length" if is_last else None,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=0,
            worker_id=self._worker_id,
            version=request.version,
        )


class MetronomeWorker(Worker):
    """The worker floor's surface over a metronome."""

    def __init__(
        self,
        *,
        worker_id: str,
        model: ModelConfig,
        engine: EngineConfig,
        pool: PoolConfig,
        fetch: Callable[[str], Awaitable[AdapterWeights]],
        node_id: str = "",
    ) -> None:
        self.worker_id = worker_id
        self._node_id = node_id
        self._event_loop = asyncio.get_running_loop()
        self._streams = {}
        self._fetches = set()
        self._engine = _Beats(self._deliver, float(os.environ["METRONOME_BEATS_PER_S"]), worker_id)  # type: ignore[assignment]
        self._loader = type("Loader", (), {"load_s": deque()})()
        self._engine.start()

    @property
    def is_stalled(self) -> bool:
        return False

    def check_health(self) -> None:
        self._engine.check_health()

    def close(self) -> None:
        self._engine.close()

    async def make_resident(self, version: str, *, hold_s: float = 0.0, pinned: bool = False) -> None:
        """Any version is there."""

    async def release_hold(self, version: str) -> None:
        """Nothing is held."""

    async def reconcile(self, named: Mapping[str, bool], asked: Collection[str] | None = None) -> None:
        """Nothing is kept."""

    async def estimate(self, manifest: AdapterManifest) -> tuple[int, tuple[str, ...]]:
        return 1, ()

    async def held_versions(self) -> tuple[str, ...]:
        return ()

    async def residency(self) -> ResidencySnapshot:
        return ResidencySnapshot(0, 1, (), 0, 0, 0)

    async def state(self) -> WorkerState:
        pages = AdapterPages(used=0, total=1)
        return WorkerState(
            worker_id=self.worker_id,
            pid=os.getpid(),
            node_id=self._node_id,
            device="metronome",
            running=self._engine.num_running,
            waiting=0,
            leases=0,
            kv_pages=KVPages(used=0, cached=0, total=1),
            adapter_pages=pages,
            adapters=(),
        )


def replica_class() -> type:
    """`WorkerReplica` with a metronome in the place of its worker. METRONOME_BEATS_PER_S sets the rate."""
    from lorafleet.cluster.worker import replica

    class MetronomeReplica(replica.WorkerReplica):
        def __init__(self, config: Any, store: Any) -> None:
            replica.Worker = MetronomeWorker  # type: ignore[attr-defined]
            super().__init__(config, store)

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return MetronomeReplica
