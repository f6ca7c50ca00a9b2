"""The ring against a plain list: every reader gets every payload, whole and in order, however slow it is."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lorafleet.workers.group.ring import RingReader, RingWriter

SIZE = 1 << 16


@pytest.fixture
def writer() -> Iterator[RingWriter]:
    writer = RingWriter(2, SIZE)
    yield writer
    writer.close()
    writer.release()


def readers_of(writer: RingWriter) -> list[RingReader]:
    return [RingReader(writer.descriptor, socket.socket(fileno=each.detach())) for each in writer.sockets]


def read_all(reader: RingReader) -> list[bytes]:
    """Copies of all payloads up to the end."""
    found: list[bytes] = []
    while True:
        try:
            payload = reader.read(1.0)
        except EOFError:
            return found
        if payload is not None:
            found.append(bytes(payload))


def copied(payload: memoryview | None) -> bytes:
    assert payload is not None, "nothing came in time"
    return bytes(payload)


def test_payloads_of_every_size_come_whole_and_in_order(writer: RingWriter) -> None:
    """Some are larger than the ring, and the whole is many times as large."""
    random = np.random.default_rng(0)
    sizes = [0, 1, 63, 64, SIZE // 4, SIZE // 4 + 1, SIZE, 3 * SIZE + 5, *random.integers(0, SIZE // 3, 300).tolist()]
    payloads = [random.bytes(size) for size in sizes]
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(read_all, reader) for reader in readers_of(writer)]
        for payload in payloads:
            cut = len(payload) // 3
            writer.write(payload[:cut], memoryview(payload)[cut:])
        writer.close()
        for each in found:
            assert each.result(30) == payloads


def test_what_is_read_stays_until_the_next_call(writer: RingWriter) -> None:
    """A writer that runs ahead waits for the slowest reader, rather than write over what that one reads."""
    first, second = readers_of(writer)
    payloads = [bytes([number]) * (SIZE // 8) for number in range(12)]
    written: list[int] = []
    is_full = threading.Event()

    def write() -> None:
        for number, payload in enumerate(payloads):
            writer.write(payload)
            written.append(number)
            if number == 7:
                is_full.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    held = first.read(5.0)
    for payload in payloads[:8]:
        assert copied(second.read(5.0)) == payload
    assert is_full.wait(5)
    assert copied(held) == payloads[0]
    assert thread.is_alive(), "the ring has room for eight payloads, of which the first reader holds all"
    for payload in payloads[1:]:
        assert copied(first.read(5.0)) == payload
    for payload in payloads[8:]:
        assert copied(second.read(5.0)) == payload
    thread.join(5)
    assert written == list(range(12))
    assert first.read(0.01) is None


def test_the_death_of_a_reader_frees_a_writer_that_waits_for_it(writer: RingWriter) -> None:
    ends = [socket.socket(fileno=each.detach()) for each in writer.sockets]
    with ThreadPoolExecutor(1) as pool:

        def fill() -> None:
            for _ in range(100):
                writer.write(bytes(SIZE // 4))

        filling = pool.submit(fill)
        for end in ends:
            end.close()
        with pytest.raises((OSError, EOFError)):
            filling.result(10)


def test_numbers_are_aligned_for_numpy(writer: RingWriter) -> None:
    reader, _ = readers_of(writer)
    for count in (3, 1, 17):
        numbers = np.arange(count, dtype=np.int32)
        writer.write(b"12345678", numbers.data)
        payload = reader.read(5.0)
        assert payload is not None
        view = np.frombuffer(payload, dtype=np.int32, offset=8)
        assert view.tolist() == numbers.tolist()
        assert view.flags.aligned
        assert not view.flags.writeable
