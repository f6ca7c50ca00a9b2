"""The processes of a service whose Ray this process has started, by what they are."""

from __future__ import annotations

import contextlib
import ctypes
from collections import defaultdict

import psutil

TITLES = {
    "worker": "ray::ServeReplica:lorafleet:worker",
    "store": "ray::ServeReplica:lorafleet:adapter_store",
    "controller": "ray::ServeReplica:lorafleet:controller",
    "ingress": "ray::ServeReplica:lorafleet:ingress",
    "proxy": "ray::ProxyActor",
    "HAProxy's manager": "ray::HAProxyManager",
    "Serve's controller": "ray::ServeController",
}


_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent dies, so that none is lost from sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def orphans() -> dict[int, str]:
    """Adopted processes of the service that still run, and what they are."""
    found = {}
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            is_of_service = title.startswith("ray::") or "lorafleet" in title or "/haproxy" in title
            if is_of_service and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = title[:120]
    return found


def processes() -> dict[str, list[psutil.Process]]:
    """Running processes of each kind, the oldest first."""
    found: defaultdict[str, list[psutil.Process]] = defaultdict(list)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline()[:1])
            kind = next((kind for kind, start in TITLES.items() if title.startswith(start)), None)
            if title.endswith("/haproxy"):
                kind = "HAProxy"
            if kind is not None and process.status() != psutil.STATUS_ZOMBIE:
                found[kind].append(process)
    for kind in found:
        found[kind].sort(key=lambda process: process.create_time())
    return dict(found)


def cpu_s_beside(old: frozenset[int]) -> float:
    """CPU seconds so far of the processes that are none of `old`."""
    seconds = 0.0
    for process in (process for each in processes().values() for process in each if process.pid not in old):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds
