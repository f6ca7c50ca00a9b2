"""A HAProxy that `lorafleet-haproxy` has started ends with its parent, and lets its answers end first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lorafleet.deploy import haproxy
from tests.support.wait import eventually

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def back() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        yield server


@pytest.fixture
def front(tmp_path: Path, back: socket.socket) -> Iterator[tuple[subprocess.Popen[str], psutil.Process, int]]:
    """The parent, its HAProxy, and the port that this listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        f"""
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    server one 127.0.0.1:{back.getsockname()[1]}
"""
    )
    command = [sys.executable, "-c", PARENT, haproxy.__file__, "-db", "-f", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            eventually(lambda: listens(port))
            yield parent, child, port
        finally:
            parent.kill()
            if child.is_running():
                child.kill()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_ends_with_its_parent_and_after_its_answers(
    front: tuple[subprocess.Popen[str], psutil.Process, int], back: socket.socket
) -> None:
    parent, child, port = front
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        while True:
            server, _ = back.accept()
            if server.recv(4096):
                break  # the probes of `listens` send nothing
        server.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc")
        seen = client.recv(4096)
        os.kill(parent.pid, signal.SIGKILL)
        eventually(lambda: not listens(port))
        assert child.is_running()
        server.sendall(b"def")
        while not seen.endswith(b"abcdef"):
            piece = client.recv(4096)
            assert piece
            seen += piece
        server.close()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
