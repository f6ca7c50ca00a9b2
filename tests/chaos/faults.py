"""Faults that are put to a running service: kills and pauses of each process, and changes by `serve deploy`.

A fault strikes and returns at once. How it heals is for the service alone.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.chaos.health import DEPLOYMENTS, await_spares
from tests.chaos.ports import Ports
from tests.chaos.processes import processes
from tests.cluster.live.service import LiveService

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
    is_harmless: bool = False
    """Whether no request may fail by it: it is planned, or short."""
    then: Fault | None = None
    """The fault that undoes it; it always follows, and counts as well."""

    prepare: Callable[[LiveService], None] = lambda service: None
    """What is done before the load begins."""

    @property
    def names(self) -> str:
        """Its name, and that of the one that follows."""
        return self.name if self.then is None else f"{self.name}, {self.then.names}"


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


def deploy(section: str, key: str, *values: object) -> Callable[[LiveService], frozenset[int]]:
    """Give a key of one section of `args` the first of the values that it does not have."""

    def strike(service: LiveService) -> frozenset[int]:
        service.args[section][key] = next(value for value in values if value != service.args[section].get(key))
        old = processes()
        service.deploy(**_numbers(service))
        return frozenset(process.pid for kind in DEPLOYMENTS for process in old.get(kind, ()))

    return strike


def scale(*, workers: int = 0, ingresses: int = 0) -> Callable[[LiveService], frozenset[int]]:
    """So many replicas more, or less."""

    def strike(service: LiveService) -> frozenset[int]:
        numbers = _numbers(service)
        numbers["num_workers"] += workers
        numbers["num_ingresses"] += ingresses
        service.deploy(**numbers)
        return frozenset()

    return strike


def want(*user_configs: dict[str, Any]) -> Callable[[LiveService], frozenset[int]]:
    """Change the desired adapters, from each of the sets to the next."""
    turns = itertools.cycle(user_configs)

    def strike(service: LiveService) -> frozenset[int]:
        service.deploy(next(turns), **_numbers(service))
        return frozenset()

    return strike


def _numbers(service: LiveService) -> dict[str, Any]:
    """Replicas that a whole service has."""
    return {
        f"num_{kind}{end}": service.states_of(kind)["RUNNING"] for kind, end in (("worker", "s"), ("ingress", "es"))
    }


FAULTS: tuple[Fault, ...] = (
    Fault("a worker is killed", kill("worker"), prepare=await_spares),
    Fault("a worker stands still", kill("worker", signal.SIGSTOP), prepare=await_spares),
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
    Fault("a worker more", scale(workers=1), True, Fault("a worker less", scale(workers=-1), True)),
    Fault("an ingress more", scale(ingresses=1), True, Fault("an ingress less", scale(ingresses=-1), True)),
    Fault("another `user_config`", want(*USER_CONFIGS), is_harmless=True),
    Fault("another `max_running`", deploy("worker", "max_running", 48, 32), is_harmless=True),
    Fault("another pool size", deploy("adapters", "pool_bytes", "640KiB", "512KiB"), is_harmless=True),
)


def _behind_haproxy(fault: Fault) -> Fault:
    then = None if fault.then is None else _behind_haproxy(fault.then)
    return replace(fault, name=f"{fault.name}, behind HAProxy", then=then)


HAPROXY_FAULTS: tuple[Fault, ...] = (
    *(_behind_haproxy(fault) for fault in FAULTS if "proxy" not in fault.name),
    Fault("HAProxy is killed", kill("HAProxy")),
    Fault("HAProxy's manager is killed", kill("HAProxy's manager")),
)


def haproxy_environment(folder: Path, ports: Ports) -> dict[str, str]:
    """Write our way to start HAProxy into a folder; return the variables that have Serve use it."""
    program = folder / "lorafleet-haproxy"
    program.write_text(f"#!{sys.executable}\nfrom lorafleet.deploy.haproxy import main\n\nmain()\n")
    program.chmod(0o755)
    http, grpc = ports.span(), ports.span()
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.one()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.one()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http.stop),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc.stop),
    }
