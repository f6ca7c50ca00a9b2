"""Runs of chaos go on side by side, end in time, and change a service by what it has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos.faults import FAULTS, HAPROXY_FAULTS, Fault, haproxy_environment
from tests.chaos.ledger import Budget, Ledger
from tests.chaos.ports import NUM_RUNS, ports_of_a_run

EPHEMERAL_FROM = 32_768
"""Linux gives programs ports from here on, unless told otherwise."""


class Deployed:
    """A service that remembers what was deployed."""

    def __init__(self) -> None:
        self.args: dict[str, Any] = {"worker": {"max_running": 32}, "adapters": {"pool_bytes": "512KiB"}}
        self.numbers = {"worker": 2, "ingress": 2}
        self.user_config: dict[str, Any] | None = None

    def states_of(self, deployment: str) -> dict[str, int]:
        return {"RUNNING": self.numbers[deployment]}

    def deploy(self, user_config: dict[str, Any] | None = None, *, num_workers: int, num_ingresses: int) -> None:
        self.numbers = {"worker": num_workers, "ingress": num_ingresses}
        self.user_config = user_config


def strike(faults: tuple[Fault, ...], word: str) -> Deployed:
    """Strike twice with what has the word in its name, and with what undoes it; returns the service."""
    service = Deployed()
    seen = []
    (fault,) = (fault for fault in faults if word in fault.names)
    for each in (fault, fault.then or fault):
        before = (json.dumps(service.args), dict(service.numbers), service.user_config)
        each.strike(service)  # type: ignore[arg-type]
        seen.append((json.dumps(service.args), dict(service.numbers), service.user_config))
        assert seen[-1] != before, f"{each.name} changed nothing"
    return service


@pytest.mark.parametrize("faults", [FAULTS, HAPROXY_FAULTS])
@pytest.mark.parametrize("word", ["worker more", "ingress less", "user_config", "max_running", "pool size"])
def test_each_change_changes_something_every_time_and_leaves_the_numbers(faults: tuple[Fault, ...], word: str) -> None:
    assert strike(faults, word).numbers == {"worker": 2, "ingress": 2}


def test_runs_share_no_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    taken: set[int] = set()
    runs = [ports_of_a_run() for _ in range(NUM_RUNS)]
    for run in runs:
        ports = run.__enter__()
        mine = {ports.one(), ports.one(), *ports.span(), *ports.span()}
        assert not taken & mine
        assert max(mine) < EPHEMERAL_FROM
        taken |= mine
    with pytest.raises(OSError, match="end one of them first"), ports_of_a_run():
        pass
    runs[3].__exit__(None, None, None)
    with ports_of_a_run() as ports:
        assert ports.one() in taken
        environment = haproxy_environment(tmp_path, ports)
    spans = [
        range(*(int(environment[f"RAY_SERVE_DIRECT_INGRESS_{end}_{kind}_PORT"]) for end in ("MIN", "MAX")))
        for kind in ("HTTP", "GRPC")
    ]
    assert not set(spans[0]) & set(spans[1])


def test_a_file_takes_lines_of_many_runs(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    code = (
        "import sys; from pathlib import Path; from tests.chaos.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for n in range(50): ledger.note({'from': sys.argv[2], 'n': n, 'fill': 'x' * 20_000})"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, out, str(run)], stdout=subprocess.DEVNULL) for run in range(3)
    ]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((line["from"], line["n"]) for line in lines) == [(str(r), n) for r in range(3) for n in range(50)]


def test_a_run_ends_after_the_trial_under_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr("tests.chaos.ledger.time.monotonic", lambda: clock.now_s)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        budget = Budget(50.0)
        assert budget.has_room("a kill")
        budget.took("a kill", 30.0)
        clock.now_s += 25.0
        assert not budget.has_room("a kill")
        assert budget.has_room("a pause")
        os.kill(os.getpid(), signal.SIGINT)
        assert not budget.has_room("a pause")
        assert "after the trial under way" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_what_was_missed_makes_a_run_fail(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger()
    assert ledger.close() == 0
    ledger.miss(["a worker more: failed 1 requests"])
    assert ledger.close() == 1
    assert "MISSED a worker more: failed 1 requests" in capsys.readouterr().err
