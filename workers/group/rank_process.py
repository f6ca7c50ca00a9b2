"""The process of another rank than the first: it starts like the first, and then follows."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from lorafleet.workers.errors import EngineFailed, WorkerConfigError
from lorafleet.workers.group.control import (
    Beat,
    ControlLine,
    Failed,
    Ready,
    Refused,
    Sized,
    Started,
    Task,
    Uploaded,
    Weights,
)
from lorafleet.workers.group.entries import read_entry
from lorafleet.workers.group.followed import FollowingCache, FollowingPool
from lorafleet.workers.group.follower import Follower
from lorafleet.workers.group.ring import RingReader
from lorafleet.workers.group.store import open_store
from lorafleet.workers.model_parts import assemble_model, device_of
from lorafleet.workers.ranks import Ranks, connect
from lorafleet.workers.sizing import MemorySizes

logger = logging.getLogger(__name__)

BEAT_S = 1.0
"""How often the rank shows that it lives, and its loop goes round without an entry."""


def run(control: int, memory: int, connection: int) -> None:
    """Be a rank until the first one ends the ring or its own life. The arguments are descriptors. Does not return."""
    line = ControlLine(Connection(control))
    task = line.receive()
    assert isinstance(task, Task), task
    logging.basicConfig(
        level=task.log_level, format=f"%(levelname)s %(asctime)s rank {task.rank} -- %(name)s: %(message)s"
    )
    process = RankProcess(task, line, RingReader(memory, socket.socket(fileno=connection)))
    try:
        process.run()
    except EOFError:
        os._exit(0)  # the system takes back what it holds, and no rank waits for another
    except BaseException as error:
        logger.exception("rank %d ends", task.rank)
        line.send(Failed(_of_rank(task.rank, error)))
        os._exit(1)


class RankProcess:
    """A rank's threads: one computes, one keeps the control line, one writes adapters."""

    def __init__(self, task: Task, line: ControlLine, ring: RingReader) -> None:
        self.ranks = Ranks()
        self._task = task
        self._line = line
        self._ring = ring
        self._beat_s = min(BEAT_S, task.engine.stall_s / 5)
        self._sizes: SimpleQueue[MemorySizes] = SimpleQueue()
        self._uploads: SimpleQueue[tuple[Weights, int]] = SimpleQueue()
        self._round_s: float | None = None
        """When the loop last went round; None before it runs."""

    def run(self) -> None:
        """Start as the first rank does, then do what it says. Raises EOFError when it ends the ring."""
        task = self._task
        torch.set_num_threads(task.num_threads)
        threading.Thread(target=self._listen, name="lorafleet-control", daemon=True).start()
        device = device_of(task.engine, task.rank)
        self._line.send(Started())
        store = open_store(task.store_path, task.size)
        self.ranks = connect(task.rank, task.size, device=device, store=store)
        parts = assemble_model(
            task.model,
            task.engine,
            task.pool,
            ranks=self.ranks,
            captures=task.captures,
            agree=self._agree,
            make_cache=FollowingCache,
            make_pool=FollowingPool,
        )
        assert isinstance(parts.cache, FollowingCache)
        assert isinstance(parts.pool, FollowingPool)
        follower = Follower(parts.runner, parts.cache, parts.pool)
        threading.Thread(target=self._upload, args=(follower, device), name="lorafleet-load", daemon=True).start()
        self._round_s = time.monotonic()
        self._line.send(Ready(str(device)))
        while True:
            payload = self._ring.read(self._beat_s)
            if payload is not None:
                follower.apply(read_entry(payload))
            self._round_s = time.monotonic()

    def _agree(self, sizes: MemorySizes) -> MemorySizes:
        self._line.send(Sized(sizes))
        return self._sizes.get()

    def _listen(self) -> None:
        """Take what comes on the control line, and beat. Without the line there is no parent, and nothing to do."""
        try:
            while True:
                if self._line.connection.poll(self._beat_s):
                    message = self._line.receive()
                    if isinstance(message, Sized):
                        self._sizes.put(message.sizes)
                    elif isinstance(message, Weights):
                        self._uploads.put((message, self._line.receive_descriptor()))
                round_s = self._round_s
                self._line.send(Beat(0.0 if round_s is None else time.monotonic() - round_s))
        except (EOFError, OSError):
            os._exit(1)

    def _upload(self, follower: Follower, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while True:
            weights, descriptor = self._uploads.get()
            try:
                follower.upload(weights, descriptor)
            except Exception as error:
                logger.warning("an adapter cannot be taken", exc_info=error)
                has_code = hasattr(error, "code")
                self._line.send(Refused(weights.number, error if has_code else _of_rank(self._task.rank, error)))
            else:
                self._line.send(Uploaded(weights.number))


def _of_rank(rank: int, error: BaseException) -> Exception:
    """The error as the first rank raises it."""
    if isinstance(error, WorkerConfigError):
        return type(error)(f"rank {rank}: {error}")
    return EngineFailed(f"rank {rank}: {type(error).__name__}: {error}")
