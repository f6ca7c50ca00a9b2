"""A service whose one worker is a group of two processes. Runs before the tests that share a service."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.live.service import args_for, live_service
from tests.support.wait import eventually

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("cluster")
def test_a_group_serves_and_is_replaced_as_one(world: Path) -> None:
    """It answers with adapters. A rank that dies takes its group along, and another group comes."""
    args = args_for(world)
    args["worker"] |= {"num_replicas": 1, "tensor_parallel_size": 2}
    with live_service(world, args) as service:
        assert service.put("one", "one").status_code == 200
        answers = [service.complete(name).raise_for_status().json()["choices"][0]["text"] for name in ("tiny", "one")]
        assert answers[0] != answers[1]
        (worker,) = service.workers()
        pids = [rank["pid"] for rank in worker["ranks"]]
        assert pids[0] == worker["pid"] != pids[1]
        assert [(rank["rank"], rank["device"]) for rank in worker["ranks"]] == [(0, "cpu"), (1, "cpu")]

        os.kill(pids[1], signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{pids[0]}").exists(), 60.0)
        eventually(lambda: bool(service.worker_ids() - {worker["worker_id"]}), 120.0)
        again = [service.complete(name).raise_for_status().json()["choices"][0]["text"] for name in ("tiny", "one")]
        assert again == answers
        last = [rank["pid"] for rank in service.workers()[0]["ranks"]]
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in last))
