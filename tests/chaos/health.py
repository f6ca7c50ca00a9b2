"""Whether a service is whole: every process is there and answers, and nothing of a request is left over."""

from __future__ import annotations

import time

import psutil
from ray import serve
from ray.serve.schema import ApplicationStatus

from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.worker.spare_keeper import READY
from tests.chaos.processes import orphans, processes
from tests.cluster.live.service import APP, LiveService, spares
from tests.support.wait import eventually

LIMIT_S = 180.0
"""How long a service may take to be whole again."""
TIDY_S = 15.0
"""How long workers may take to let go of what their clients have left."""
DEPLOYMENTS = {"worker": "worker", "store": "adapter_store", "controller": "controller", "ingress": "ingress"}
"""Kind of process -> the deployment whose replicas they are."""


def is_whole(service: LiveService, gone: frozenset[int] = frozenset()) -> bool:
    """Return True if every process is there and answers, and none is left of those that were to go."""
    found = processes()
    all_found = [process for each in found.values() for process in each]
    try:
        if any(process.pid in gone or process.status() == psutil.STATUS_STOPPED for process in all_found):
            return False
        application = serve.status().applications[APP]
        if application.status != ApplicationStatus.RUNNING:
            return False
        states = {name: service.states_of(name) for name in application.deployments}
        if any(set(each) != {"RUNNING"} for each in states.values()):
            return False
        if any(len(found.get(kind, ())) != states[name]["RUNNING"] for kind, name in DEPLOYMENTS.items()):
            return False  # Serve may not have noticed yet
        if not found.get("Serve's controller") or not (found.get("proxy") or found.get("HAProxy")):
            return False
        return (
            service.http.get("/readyz").status_code == 200
            and service.http.get("/admin/v1/adapters").status_code == 200
            and len(service.workers()) == states["worker"]["RUNNING"]
        )
    except Exception:
        return False  # also Serve's controller may be away


def await_whole(service: LiveService, gone: frozenset[int] = frozenset()) -> float:
    """Return the time at which the service is whole. Raises TimeoutError after `LIMIT_S`."""
    deadline_s = time.monotonic() + LIMIT_S
    time.sleep(0.2)
    while not is_whole(service, gone):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the service is not whole again within {LIMIT_S:.0f} s")
        time.sleep(0.2)
    return time.monotonic()


def await_spares(service: LiveService) -> None:
    """Wait until each worker that dies would find a process in reserve. Raises AssertionError after `LIMIT_S`."""
    count = AppConfig.model_validate(service.args).worker.spare_processes
    eventually(lambda: len(spares(READY)) >= count * len({worker["node_id"] for worker in service.workers()}), LIMIT_S)


def leftovers(service: LiveService) -> list[str]:
    """What is not let go of though no client asks anything: requests, leases, pages, and processes without a parent."""
    deadline_s = time.monotonic() + TIDY_S
    while True:
        busy = [
            f"worker {worker['worker_id']} has {worker['running']} running, {worker['waiting']} waiting, "
            f"{worker['leases']} leases, {worker['kv_pages']['used']} pages"
            for worker in service.workers()
            if worker["running"] or worker["waiting"] or worker["leases"] or worker["kv_pages"]["used"]
        ]
        left = busy + [f"process {pid} is left over: {title}" for pid, title in orphans().items()]
        if not left or time.monotonic() > deadline_s:
            return left
        time.sleep(0.2)
