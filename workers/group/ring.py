"""A ring in shared memory: one process writes, others read the same bytes, in the same order.

A payload is written once, however many readers there are. A record of 16 bytes for each goes through a reader's
socket: it wakes the reader, orders the two processes' memory accesses, and tells each end of the other's death.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Sequence

from lorafleet.workers.group.shared_memory import make_memory

RING_BYTES = 16 << 20
"""Default size: some steps of a large batch with long contexts."""
_PARTS = 8
"""A reader gives room back by eighths of the ring; a payload of more than two of them is written in pieces."""
_ALIGN = 64
_RECORD = struct.Struct("<QII")
"""Place in the stream of bytes, size, and 1 if more of the same payload follows."""
_TAIL = struct.Struct("<Q")


class RingWriter:
    """The writing end. One thread writes. The sockets and the memory are the caller's to hand to the readers."""

    def __init__(self, num_readers: int, size: int = RING_BYTES) -> None:
        self.descriptor = make_memory(size)
        self._map = mmap.mmap(self.descriptor, size)
        self._memory = memoryview(self._map)
        pairs = [socket.socketpair() for _ in range(num_readers)]
        self._sockets = [ours for ours, _ in pairs]
        self.sockets = [theirs for _, theirs in pairs]
        """The readers' ends; close them here once the readers have them."""
        self._head = 0
        self._tails = [0] * num_readers

    def write(self, *parts: bytes | memoryview) -> None:
        """Write one payload, the parts end to end. Blocks while a reader is too far behind.

        Raises OSError when a reader is gone.
        """
        views = [memoryview(part).cast("B") for part in parts]
        size, piece = sum(view.nbytes for view in views), 2 * len(self._memory) // _PARTS
        if size <= piece:
            self._put(views, size, False)
            return
        whole = memoryview(b"".join(views))
        for first in range(0, size, piece):
            part = whole[first : first + piece]
            self._put([part], part.nbytes, first + piece < size)

    def close(self) -> None:
        """End the stream: readers get EOFError behind what was written. Any thread may call it."""
        for each in self._sockets:
            with contextlib.suppress(OSError):  # the reader is gone
                each.shutdown(socket.SHUT_WR)

    def release(self) -> None:
        """Give memory and descriptors back. Nothing is written any more."""
        self._memory.release()
        self._map.close()
        for each in (*self._sockets, *self.sockets):
            each.close()
        os.close(self.descriptor)

    def _put(self, views: Sequence[memoryview], size: int, more: bool) -> None:
        capacity = len(self._memory)
        if self._head % capacity + size > capacity:
            self._head += -self._head % capacity
        self._wait_for_room(self._head + size - capacity)
        end = self._head % capacity
        for view in views:
            self._memory[end : end + view.nbytes] = view
            end += view.nbytes
        record = _RECORD.pack(self._head, size, more)
        self._head += size + -size % _ALIGN
        for each in self._sockets:
            each.sendall(record)

    def _wait_for_room(self, least_tail: int) -> None:
        """Block until every reader has given back what lies before `least_tail`."""
        for number, each in enumerate(self._sockets):
            while self._tails[number] < least_tail:
                (self._tails[number],) = _TAIL.unpack(_receive(each, _TAIL.size))


class RingReader:
    """A reading end, over descriptors that the writer's process has handed on."""

    def __init__(self, memory: int, connection: socket.socket) -> None:
        self._ring = memoryview(mmap.mmap(memory, 0, access=mmap.ACCESS_READ))
        self._socket = connection
        self._tail = self._told = 0

    def read(self, timeout_s: float) -> memoryview | None:
        """The next payload, valid until the next call; None when nothing came in time. Raises EOFError at the end."""
        if self._tail - self._told > len(self._ring) // _PARTS:
            self._tell()
        self._socket.settimeout(timeout_s)
        try:
            record = self._socket.recv(_RECORD.size)
        except TimeoutError:
            return None
        self._socket.settimeout(None)
        view, more = self._take(record)
        if not more:
            return view
        pieces = [bytes(view)]
        while more:
            self._tell()
            view, more = self._take(b"")
            pieces.append(bytes(view))
        return memoryview(b"".join(pieces))

    def _take(self, begun: bytes) -> tuple[memoryview, bool]:
        record = begun + (_receive(self._socket, _RECORD.size - len(begun)) if len(begun) < _RECORD.size else b"")
        head, size, more = _RECORD.unpack(record)
        self._tail = head + size
        start = head % len(self._ring)
        return self._ring[start : start + size], bool(more)

    def _tell(self) -> None:
        """Give back all that was read before."""
        self._told = self._tail
        with contextlib.suppress(OSError):  # the writer is gone, as the next record will tell
            self._socket.sendall(_TAIL.pack(self._tail))


def _receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises EOFError when the other end is gone."""
    received = b""
    while len(received) < size:
        more = connection.recv(size - len(received))
        if not more:
            raise EOFError("the other end of the ring is gone")
        received += more
    return received
