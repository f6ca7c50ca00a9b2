"""The line between the first rank and one other, beside the ring: the start, weights, beats, and what went wrong."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

from lorafleet.adapter_store.manifest import Dtype
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.sizing import MemorySizes


@dataclass(frozen=True, slots=True)
class Task:
    """The first message to a rank: who it is and what it computes."""

    rank: int
    size: int
    model: ModelConfig
    engine: EngineConfig
    pool: PoolConfig
    captures: bool
    store_path: str
    """For `open_store`."""
    num_threads: int
    log_level: int


@dataclass(frozen=True, slots=True)
class Weights:
    """An adapter's weights. A descriptor of shared memory follows, which holds them."""

    number: int
    """Of the allocation."""
    dtype: Dtype
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Started:
    """The rank has its modules and its device, and is about to meet the others."""


@dataclass(frozen=True, slots=True)
class Sized:
    """Sizes of a rank's memories; to a rank: those of all of them."""

    sizes: MemorySizes


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank takes steps."""

    device: str


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The rank's part of the weights is written."""

    number: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The rank cannot take the adapter."""

    number: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Beat:
    """The rank lives."""

    still_s: float
    """Seconds since its loop last went round."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The rank ends by this error."""

    error: Exception


ToRank = Task | Sized | Weights
FromRank = Started | Sized | Ready | Uploaded | Refused | Beat | Failed


class ControlLine:
    """One end of a connection that carries messages, and descriptors behind some of them. Any thread may send."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, message: ToRank | FromRank, descriptor: int | None = None) -> None:
        """Send a message. Raises OSError when the other end is gone."""
        with self._lock:
            self.connection.send(message)
            if descriptor is not None:
                send_handle(self.connection, descriptor, os.getpid())

    def receive(self) -> ToRank | FromRank:
        """The next message. Raises EOFError or OSError when the other end is gone."""
        message: ToRank | FromRank = self.connection.recv()
        return message

    def receive_descriptor(self) -> int:
        """The descriptor behind the message that came last. The caller closes it."""
        descriptor: int = recv_handle(self.connection)
        return descriptor
