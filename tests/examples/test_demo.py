"""`make demo` does what it says, says so by its exit code, and leaves nothing running."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "demo.py"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def processes_of(folder: Path) -> set[str]:
    """Command lines of living processes that name `folder`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in command:
                found.add(command)
    return found


@pytest.mark.timeout(400)
def test_the_demo_holds_its_checks_and_cleans_up(tmp_path: Path) -> None:
    # Short, for the paths of Ray's sockets.
    folder = Path("/tmp") / f"lf{os.getpid()}"
    folder.mkdir()
    try:
        environment = os.environ | {"TMPDIR": str(folder)}
        result = subprocess.run(
            [sys.executable, DEMO], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "THE SKY IS BLUE." in result.stdout
        assert "HEY! THE SKY IS BLUE!!!" in result.stdout
        deadline = time.monotonic() + 20
        while left := processes_of(folder):
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        assert not list(folder.iterdir())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(400)
def test_an_interrupt_while_it_starts_stops_all_of_it(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"lfi{os.getpid()}"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, DEMO], env=os.environ | {"TMPDIR": str(folder)}, cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        while not any("raylet" in command for command in processes_of(folder)):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        deadline = time.monotonic() + 20
        while left := processes_of(folder):
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
    finally:
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)
