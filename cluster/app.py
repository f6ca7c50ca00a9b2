"""Builds the Serve application: `import_path: lorafleet.cluster.app:build`.

Four deployments of plain classes: `ingress` (HTTP and names, as many replicas as wanted), `worker` (one engine each),
`controller` (roll-outs) and `adapter_store`, one replica each. What Serve is told of each of them is here and nowhere
else. No postponed annotations here: Serve reads the type of `build`'s argument at run time.
"""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application
from ray.serve.schema import LoggingConfig

from lorafleet.cluster.admin.controller import Controller
from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.ingress import Ingress, take_http_app
from lorafleet.cluster.ray_internals import environment_with_hook
from lorafleet.cluster.store.replica import StoreReplica
from lorafleet.cluster.worker.replica import WorkerReplica
from lorafleet.cluster.worker.spare_keeper import HOOK

logger = logging.getLogger(__name__)

MAX_CALLS = 10_000
"""Calls that a deployment takes at once. Requests come by connections, each of which Serve counts as a call: every
ingress bounds them by itself, for each worker."""
STATS_PERIOD_S = 1.0
"""How often workers tell the routers what they hold."""
HEALTH_PERIOD_S = 1.0
"""How soon a dead replica is found and replaced."""
HEALTH_TIMEOUT_S = 30.0
SOLE_ROUTER = "lorafleet.cluster.routing.sole_router:SoleRouter"

SHARED: Any = {
    "max_ongoing_requests": MAX_CALLS,
    "health_check_period_s": HEALTH_PERIOD_S,
    "health_check_timeout_s": HEALTH_TIMEOUT_S,
    "graceful_shutdown_wait_loop_s": 0.2,
    "logging_config": LoggingConfig(enable_access_log=False),
}
"""Options of every deployment."""


def build(args: AppConfig) -> Application:
    """The application that `args` describes. Relative paths in it are taken from the working directory."""
    config = args.resolved(Path.cwd())
    store = _store(config)
    workers = _workers(config, store)
    return _ingress(config, workers, store, _controller(config, workers, store))


def _store(config: AppConfig) -> Application:
    deployment = serve.deployment(
        name="adapter_store",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(request_router_class=SOLE_ROUTER),
        graceful_shutdown_timeout_s=5.0,
        **SHARED,
    )
    return deployment(StoreReplica).bind(config)


def _workers(config: AppConfig, store: Application) -> Application:
    worker = config.worker
    deployment = serve.deployment(
        name="worker",
        num_replicas=worker.num_replicas,
        ray_actor_options={
            "num_cpus": worker.num_cpus,
            "num_gpus": worker.num_gpus,
            **({"runtime_env": environment_with_hook(HOOK)} if worker.spare_processes and _is_found_anywhere() else {}),
        },
        request_router_config=RequestRouterConfig(
            request_router_class="lorafleet.cluster.routing.worker_router:WorkerRouter",
            request_routing_stats_period_s=STATS_PERIOD_S,
            request_routing_stats_timeout_s=HEALTH_TIMEOUT_S,
        ),
        graceful_shutdown_timeout_s=worker.drain_s,
        **SHARED,
    )
    return deployment(WorkerReplica).bind(config, store)


def _is_found_anywhere() -> bool:
    """Return True if a process finds this package without its caller's `sys.path`, which Ray hands on after hooks."""
    look = "import importlib.util as u; raise SystemExit(u.find_spec('lorafleet.cluster') is None)"
    is_found = (
        subprocess.run([sys.executable, "-P", "-c", look], cwd="/", capture_output=True, check=False).returncode == 0
    )
    if not is_found:
        logger.info("no process is kept in reserve for workers: lorafleet is found by sys.path of the caller only")
    return is_found


def _controller(config: AppConfig, workers: Application, store: Application) -> Application:
    deployment = serve.deployment(
        name="controller",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(request_router_class=SOLE_ROUTER),
        graceful_shutdown_timeout_s=5.0,
        **SHARED,
    )
    return deployment(Controller).bind(config, workers, store)


def _ingress(config: AppConfig, workers: Application, store: Application, controller: Application) -> Application:
    deployment = serve.deployment(
        name="ingress",
        num_replicas=config.ingress.num_replicas,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=config.worker.drain_s,
        **SHARED,
    )
    return deployment(serve.ingress(take_http_app)(Ingress)).bind(config, workers, store, controller)
