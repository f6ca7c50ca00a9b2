"""The other ranks of a worker, as its first rank has them: processes that it starts, tells what to do, and ends.

A thread of its own starts the processes, listens to them and judges whether they live. When one ends or stands still,
it ends all of them: the worker is lost as a whole, and is to be replaced as a whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import TypeVar

import torch

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.errors import EngineFailed
from lorafleet.workers.group.control import (
    Beat,
    ControlLine,
    Failed,
    FromRank,
    Ready,
    Refused,
    Sized,
    Started,
    Task,
    Uploaded,
    Weights,
)
from lorafleet.workers.group.entries import Allocated, Change, parts_of_change, parts_of_step
from lorafleet.workers.group.ring import RingWriter
from lorafleet.workers.group.staging import staged
from lorafleet.workers.group.store import StoreFile, open_store
from lorafleet.workers.ranks import Ranks, connect
from lorafleet.workers.sizing import MemorySizes
from lorafleet.workers.state import RankState
from lorafleet.workers.step.message import StepMessage

logger = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=FromRank)

LOOK_S = 0.5
"""How often silence is judged."""
END_S = 5.0
"""How long a rank may take to end by itself."""
LOST_S = 1.0
"""How long after a failure the first rank may tell its requests."""
_BOOT = (
    "import sys; parent, *descriptors = map(int, sys.argv[1:5]); sys.path[:] = sys.argv[5:]; "
    "from lorafleet.workers.group import parent as parents; parents.die_with(parent); "
    "from lorafleet.workers.group import rank_process; rank_process.run(*descriptors)"
)
"""What a rank's interpreter runs. It imports what this one would, and no more of this process than that."""


@dataclass(slots=True)
class _Member:
    """One other rank."""

    rank: int
    process: subprocess.Popen[bytes]
    line: ControlLine
    heard_s: float
    """When it last sent anything."""
    is_ready: bool = False
    device: str = ""


@dataclass(slots=True)
class _State:
    """The group's end, as several threads see it."""

    failure: Exception | None = None
    failed_s: float = 0.0
    is_closing: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Group:
    """Ranks 1 and up of a worker. Steps and changes are told by one thread at a time, uploads by any."""

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        pool: PoolConfig,
        *,
        captures: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the processes, which load the base meanwhile. `close` ends them."""
        self.size = engine.tensor_parallel_size
        self.on_failure: Callable[[], None] = lambda: None
        """Called once, from a thread of the group's, when a rank is lost."""
        self.ranks = Ranks()
        self._engine = engine
        self._clock = clock
        self._state = _State()
        self._failed = threading.Event()
        self._members: list[_Member] = []
        self._replies: SimpleQueue[tuple[int, FromRank]] = SimpleQueue()
        self._uploads = threading.Lock()
        self._numbers: dict[int, int] = {}
        """By slot, the number of its last allocation."""
        self._num_allocations = 0
        self._is_cuda = False
        self._ring = RingWriter(self.size - 1)
        self._store = StoreFile()
        self._woken, self._wake = Pipe(duplex=False)
        tasks = [
            Task(
                rank=rank,
                size=self.size,
                model=model,
                engine=engine,
                pool=pool,
                captures=captures,
                store_path=self._store.path,
                num_threads=torch.get_num_threads(),
                log_level=logging.getLogger("lorafleet").getEffectiveLevel(),
            )
            for rank in range(1, self.size)
        ]
        begun: Future[None] = Future()
        self._keeper = threading.Thread(target=self._keep, args=(tasks, begun), name="lorafleet-group", daemon=True)
        self._keeper.start()
        begun.result()

    # --- the start, in this order ---

    def connect(self, device: torch.device) -> Ranks:
        """Meet the other ranks. Raises what one of them raises before."""
        self._gather(Started)
        self._is_cuda = device.type == "cuda"
        with self._explaining():
            self.ranks = connect(0, self.size, device=device, store=open_store(self._store.path, self.size))
        return self.ranks

    def agree(self, sizes: MemorySizes) -> MemorySizes:
        """The least of all ranks' sizes, which they get too."""
        found = [sizes, *(reply.sizes for reply in self._gather(Sized))]
        least = MemorySizes(
            num_kv_pages=min(each.num_kv_pages for each in found), pool_bytes=min(each.pool_bytes for each in found)
        )
        for member in self._members:
            member.line.send(Sized(least))
        return least

    def wait_ready(self) -> None:
        """Wait until all ranks take steps. Raises what one of them raises."""
        for member, reply in zip(self._members, self._gather(Ready), strict=True):
            member.device = reply.device

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """A start of the first rank: its failure ends the others, and if they failed first, theirs is the cause."""
        try:
            with self._explaining():
                yield
        except BaseException:
            self.close()
            raise

    # --- steps and changes ---

    def check(self) -> None:
        """Raises EngineFailed when a rank is lost."""
        failure = self._state.failure
        if failure is not None:
            raise EngineFailed(str(failure))

    def tell_step(self, message: StepMessage, chosen: torch.Tensor | None) -> None:
        """Have the others compute a step, behind all that they were told before. Raises EngineFailed.

        chosen: (n,) int64 on the device, the tokens that the step in flight chooses. The others get them if they need.
        """
        self._write(*parts_of_step(message))
        if message.header.has_pending:
            assert chosen is not None
            self.ranks.broadcast(chosen)

    def tell(self, change: Change) -> None:
        """Have the others change their memories, likewise. Raises EngineFailed."""
        self._write(*parts_of_change(change))

    def tell_allocated(self, manifest: AdapterManifest, slot: int) -> None:
        """Have the others allocate pages for a slot's adapter, likewise. Raises EngineFailed."""
        self._numbers[slot] = self._num_allocations
        self._num_allocations += 1
        self.tell(Allocated(manifest, slot, self._numbers[slot]))

    @contextlib.contextmanager
    def uploading(self, slot: int, weights: AdapterWeights) -> Iterator[None]:
        """Have the others write their parts of a slot's adapter while the block writes this rank's. One at a time.

        Raises what another rank raises when it cannot take the adapter, and EngineFailed.
        """
        with self._uploads, staged(weights) as descriptor:
            self.check()
            message = Weights(self._numbers[slot], weights.dtype, weights.shapes)
            for member in self._members:
                with contextlib.suppress(OSError):  # it is gone, as its end will tell
                    member.line.send(message, descriptor)
            try:
                yield
            finally:
                replies = self._gather(Uploaded, Refused)
            for rank, reply in enumerate(replies, start=1):
                if isinstance(reply, Refused):
                    logger.warning("rank %d cannot take adapter version %s", rank, weights.manifest.version[:12])
                    raise reply.error

    # --- life ---

    @property
    def is_lost(self) -> bool:
        """True if a rank has been lost for so long that all requests know: only the end of the process helps then."""
        state = self._state
        return state.failure is not None and self._clock() - state.failed_s > LOST_S

    def states(self) -> tuple[RankState, ...]:
        """The other ranks, now."""
        now = self._clock()
        return tuple(
            RankState(rank=one.rank, pid=one.process.pid, device=one.device, silent_s=round(now - one.heard_s, 1))
            for one in self._members
        )

    def close(self) -> None:
        """End the other ranks. No step may be running here."""
        with self._state.lock:
            if self._state.is_closing:
                return
            self._state.is_closing = True
        self._ring.close()
        if self._state.failure is None or not self._is_cuda:  # NCCL would wait for those that are gone
            with contextlib.suppress(RuntimeError):
                self.ranks.close()
        self._wake.send_bytes(b"!")
        self._keeper.join()
        self._wake.close()
        self._woken.close()
        self._ring.release()
        self._store.close()

    def _write(self, *parts: bytes | memoryview) -> None:
        self.check()
        try:
            self._ring.write(*parts)
        except (OSError, EOFError) as error:
            self.check()
            raise EngineFailed("another rank of the worker is gone") from error

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """An error that another rank's end brought about is that rank's."""
        try:
            yield
        except Exception as error:
            if _is_of_a_collective(error):
                self._failed.wait(LOOK_S)  # it may notice a moment before the keeper does
            failure = self._state.failure
            if failure is None or error is failure or str(failure).endswith(str(error)):  # all ranks found the same
                raise
            raise failure from error

    def _gather(self, *kinds: type[Reply]) -> list[Reply]:
        """A reply of each rank, in their order. Raises the failure of one that is lost."""
        if self._state.failure is not None:
            raise self._state.failure
        found: dict[int, Reply] = {}
        while len(found) < len(self._members):
            rank, reply = self._replies.get()
            if isinstance(reply, Failed):
                raise reply.error
            assert isinstance(reply, kinds), (rank, reply, kinds)
            found[rank] = reply
        return [found[member.rank] for member in self._members]

    # --- on the keeper's thread ---

    def _keep(self, tasks: list[Task], begun: Future[None]) -> None:
        """Start the processes and look after them. They end with this thread, which the system sees as their parent."""
        try:
            for task in tasks:
                self._members.append(self._start(task))
        except BaseException as error:
            self._end()
            begun.set_exception(error)
            return
        begun.set_result(None)
        try:
            self._look_after()
        except Exception as error:
            self._fail(EngineFailed(f"nobody looks after the worker's group any more: {type(error).__name__}: {error}"))
            raise
        finally:
            self._end()

    def _look_after(self) -> None:
        """Listen to the ranks until the end."""
        lines = {member.line.connection: member for member in self._members}
        while not self._state.is_closing:
            for ready in wait([*lines, self._woken], LOOK_S):
                member = lines.get(ready) if isinstance(ready, Connection) else None
                if member is not None and not self._hear(member):
                    del lines[member.line.connection]
            self._judge()

    def _start(self, task: Task) -> _Member:
        ours, theirs = Pipe()
        connection = self._ring.sockets[task.rank - 1]
        descriptors = (theirs.fileno(), self._ring.descriptor, connection.fileno())
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *map(str, (os.getpid(), *descriptors)), *sys.path],
            stdin=subprocess.DEVNULL,
            pass_fds=(*descriptors, self._store.descriptor),
        )
        theirs.close()
        connection.close()
        line = ControlLine(ours)
        with contextlib.suppress(OSError):  # it has ended already, as the keeper will hear
            line.send(task)
        return _Member(task.rank, process, line, self._clock())

    def _hear(self, member: _Member) -> bool:
        """Take a message; False at the end of the line."""
        try:
            message = member.line.receive()
        except (EOFError, OSError):
            self._fail(EngineFailed(f"rank {member.rank} of the worker's group {_end_of(member.process)}"))
            return False
        member.heard_s = self._clock()
        if isinstance(message, Beat):
            if message.still_s > self._engine.stall_s:
                self._fail(_stalled(member.rank, message.still_s, self._engine.stall_s))
        elif isinstance(message, Failed):
            self._fail(message.error)
        else:
            member.is_ready = member.is_ready or isinstance(message, Ready)
            assert not isinstance(message, Task | Weights), message
            self._replies.put((member.rank, message))
        return True

    def _judge(self) -> None:
        """Find ranks that are silent: a process that is stopped says nothing."""
        for member in self._members:
            silent_s = self._clock() - member.heard_s
            if member.is_ready and silent_s > self._engine.stall_s:
                self._fail(_stalled(member.rank, silent_s, self._engine.stall_s))

    def _fail(self, error: Exception) -> None:
        """A rank is lost, and so all are. What waits for them anywhere ends."""
        with self._state.lock:
            if self._state.failure is not None or self._state.is_closing:
                return
            self._state.failed_s = self._clock()
            self._state.failure = error
        logger.error("the worker's group ends: %s", error)
        for member in self._members:
            member.process.kill()
        self._ring.close()
        self._replies.put((0, Failed(error)))
        self._failed.set()
        self.on_failure()

    def _end(self) -> None:
        for member in self._members:
            try:
                member.process.wait(END_S)
            except subprocess.TimeoutExpired:
                logger.warning("rank %d does not end, and is killed", member.rank)
                member.process.kill()
                member.process.wait()
            member.line.connection.close()


def _is_of_a_collective(error: BaseException | None) -> bool:
    """True if an error may stem from a collective that another rank did not join."""
    while error is not None and type(error) is not RuntimeError:
        error = error.__cause__
    return error is not None


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """Say how a process ended."""
    try:
        code = process.wait(END_S)
    except subprocess.TimeoutExpired:
        return "hung up"
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def _stalled(rank: int, still_s: float, stall_s: float) -> EngineFailed:
    return EngineFailed(f"rank {rank} of the worker's group has stood still for {still_s:.0f} s, more than {stall_s:g}")
