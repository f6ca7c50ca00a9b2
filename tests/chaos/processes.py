"""The processes of a service whose Ray this process has started, by what they are."""

from __future__ import annotations

import contextlib
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
