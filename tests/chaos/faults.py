"""Faults that are put to a running service: kills and pauses of each process, and changes by `serve deploy`.

A fault strikes and returns at once. How it heals is for the service alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.chaos.processes import processes
from tests.cluster.live.service import LiveService, free_port

USER_CONFIGS: tuple[dict[str, Any], ...] = (
    {"adapters": [{"name": "wanted", "source": "demo", "key": "thin"}]},
    {"adapters": []},
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, or is changed."""

    name: str
    strike: Callable[[LiveService], frozenset[int]]
    """Do it. Returns the ids of the processes that must be gone when all is well again."""
    undo: Callable[[LiveService], object] = lambda service: None
    """Give the service its former settings back; runs once it is whole."""
    is_harmless: bool = False
    """Whether no request may fail by it: it is planned, or short."""


def kill(kind: str, number: signal.Signals = signal.SIGKILL) -> Callable[[LiveService], frozenset[int]]:
    """Signal the oldest process of a kind."""

    def strike(service: LiveService) -> frozenset[int]:
        victim = processes()[kind][0]
        os.kill(victim.pid, number)
        return frozenset({victim.pid})

    return strike


def pause(kind: str, seconds: float = 8.0) -> Callable[[LiveService], frozenset[int]]:
    """Stop the oldest process of a kind, and let it go on before anybody ends it."""

    def strike(service: LiveService) -> frozenset[int]:
        victim = processes()[kind][0]
        os.kill(victim.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(victim.pid, signal.SIGCONT)
        return frozenset()

    return strike


def deploy(section: str, **values: object) -> Callable[[LiveService], frozenset[int]]:
    """Change settings of one section of `args`."""

    def strike(service: LiveService) -> frozenset[int]:
        service.args[section].update(values)
        service.deploy(num_workers=2)
        old = processes()
        return frozenset(process.pid for kind in ("worker", "ingress", "store") for process in old[kind])

    return strike


def scale(num_workers: int = 2, num_ingresses: int = 1) -> Callable[[LiveService], frozenset[int]]:
    """Change the numbers of replicas."""

    def strike(service: LiveService) -> frozenset[int]:
        service.deploy(num_workers=num_workers, num_ingresses=num_ingresses)
        return frozenset()

    return strike


def want(user_config: dict[str, Any]) -> Callable[[LiveService], frozenset[int]]:
    """Change the desired adapters."""

    def strike(service: LiveService) -> frozenset[int]:
        service.deploy(user_config, num_workers=2)
        return frozenset()

    return strike


FAULTS: tuple[Fault, ...] = (
    Fault("a worker is killed", kill("worker")),
    Fault("a worker stands still", kill("worker", signal.SIGSTOP)),
    Fault("the store is killed", kill("store")),
    Fault("the store stands still", kill("store", signal.SIGSTOP)),
    Fault("the controller is killed", kill("controller")),
    Fault("the controller stands still", kill("controller", signal.SIGSTOP)),
    Fault("the ingress is killed", kill("ingress")),
    Fault("the ingress stands still", kill("ingress", signal.SIGSTOP)),
    Fault("the proxy is killed", kill("proxy")),
    Fault("Serve's controller is killed", kill("Serve's controller")),
    Fault("a worker pauses for 8 s", pause("worker"), is_harmless=True),
    Fault("the store pauses for 8 s", pause("store"), is_harmless=True),
    Fault("the controller pauses for 8 s", pause("controller"), is_harmless=True),
    Fault("the ingress pauses for 8 s", pause("ingress"), is_harmless=True),
    Fault("the proxy pauses for 8 s", pause("proxy"), is_harmless=True),
    Fault("Serve's controller pauses for 8 s", pause("Serve's controller"), is_harmless=True),
    Fault("a worker more", scale(num_workers=3), scale(), is_harmless=True),
    Fault("a worker less", scale(num_workers=1), scale(), is_harmless=True),
    Fault("an ingress more", scale(num_ingresses=2), scale(), is_harmless=True),
    Fault("another `user_config`", want(USER_CONFIGS[0]), want(USER_CONFIGS[1]), is_harmless=True),
    Fault("another `max_running`", deploy("worker", max_running=48), is_harmless=True),
    Fault("another pool size", deploy("adapters", pool_bytes="640KiB"), is_harmless=True),
)

_BEHIND = ", behind HAProxy"
HAPROXY_FAULTS: tuple[Fault, ...] = (
    *(replace(fault, name=fault.name + _BEHIND) for fault in FAULTS if "proxy" not in fault.name),
    Fault("HAProxy is killed", kill("HAProxy")),
    Fault("HAProxy's manager is killed", kill("HAProxy's manager")),
)


def haproxy_environment(folder: Path) -> dict[str, str]:
    """Write our way to start HAProxy into a folder; return the variables that have Serve use it."""
    program = folder / "lorafleet-haproxy"
    program.write_text(f"#!{sys.executable}\nfrom lorafleet.deploy.haproxy import main\n\nmain()\n")
    program.chmod(0o755)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    }
