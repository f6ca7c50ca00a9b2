"""A service on a Ray cluster of its own, deployed from a Serve config as `serve deploy` does it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from lorafleet.cluster.worker.spare_keeper import READY, STARTING, FileLock
from tests.support.wait import eventually

APP = "lorafleet"
BASE_ID = "tiny"
TOKEN = "a-token-for-tests"
OBJECT_STORE_BYTES = 200 * 2**20


@dataclass(slots=True)
class LiveService:
    """What runs, and the ways to reach it."""

    url: str
    root: Path
    """Folder with `base` and `adapters`; the store's state lies beside them."""
    args: dict[str, Any]
    http: httpx.Client = field(init=False)
    """For many threads: a connection for each request, as httpcore's pool may close one that another
    thread has just taken for reuse (encode/httpcore#1110)."""

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=256)
        headers = {"authorization": f"Bearer {TOKEN}", "connection": "close"}
        self.http = httpx.Client(base_url=self.url, timeout=150, headers=headers, limits=limits)

    def deploy(
        self, user_config: dict[str, Any] | None = None, *, num_ingresses: int = 1, num_workers: int | None = None
    ) -> None:
        """Deploy, or change the `user_config` or the number of ingresses or workers of what is deployed."""
        ingress: dict[str, Any] = {"name": "ingress", "num_replicas": num_ingresses}
        worker = [] if num_workers is None else [{"name": "worker", "num_replicas": num_workers}]
        if user_config is not None:
            ingress["user_config"] = user_config
        application = {
            "name": APP,
            "import_path": "lorafleet.cluster.app:build",
            "route_prefix": "/",
            "args": self.args,
            "deployments": [ingress, *worker],
        }
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def await_ready(self, timeout_s: float = 240.0) -> None:
        def is_ready() -> bool:
            application = serve.status().applications[APP]
            assert application.status != ApplicationStatus.DEPLOY_FAILED, application
            return self.http.get("/readyz").status_code == 200

        eventually(is_ready, timeout_s)

    def workers(self) -> list[dict[str, Any]]:
        """The workers as the admin plane shows them."""
        workers: list[dict[str, Any]] = self.http.get("/admin/v1/workers").raise_for_status().json()["workers"]
        return workers

    def worker_ids(self) -> set[str]:
        return {worker["worker_id"] for worker in self.workers()}

    def adapter(self, name: str) -> dict[str, Any]:
        adapter: dict[str, Any] = self.http.get(f"/admin/v1/adapters/{name}").raise_for_status().json()
        return adapter

    def put(self, name: str, key: str, **body: Any) -> httpx.Response:
        return self.http.put(f"/admin/v1/adapters/{name}", json={"source": "demo", "key": key, **body})

    def complete(self, model: str, **body: Any) -> httpx.Response:
        """A greedy completion of 8 tokens, whatever the body does not say otherwise."""
        request = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **body}
        return self.http.post("/v1/completions", json=request)

    def stream(self, model: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a streamed completion, without `[DONE]`."""
        request = {"model": model, "prompt": "Hello", "temperature": 0, "ignore_eos": True, "stream": True, **body}
        with self.http.stream("POST", "/v1/completions", json=request) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def complete_many(self, model: str, count: int, **body: Any) -> list[httpx.Response]:
        """As many at once."""
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda _: self.complete(model, **body), range(count)))

    def states_of(self, deployment: str) -> dict[str, int]:
        """Replicas of a deployment by their state."""
        states = serve.status().applications[APP].deployments[deployment].replica_states
        return {str(getattr(state, "value", state)): count for state, count in states.items() if count}

    def kill(self, deployment: str, *, worker_id: str | None = None) -> int:
        """SIGKILL the process of a replica; returns its pid."""
        client = _get_global_client()
        assert client is not None
        replicas = client.get_serve_details()["applications"][APP]["deployments"][deployment]["replicas"]
        pid: int = next(r["pid"] for r in replicas if worker_id is None or r["replica_id"] == worker_id)
        os.kill(pid, signal.SIGKILL)
        return pid


def served_by(responses: Sequence[httpx.Response]) -> set[str]:
    """The workers that answered."""
    return {response.raise_for_status().json()["lorafleet"]["worker_id"] for response in responses}


def version_of(response: httpx.Response) -> str:
    version: str = response.raise_for_status().json()["lorafleet"]["version"]
    return version


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def spares(*states: str) -> set[int]:
    """Ids of the processes that the running Ray keeps in reserve, and that are in one of these states."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    locks = [FileLock(path) for path in session.glob("lorafleet-*/spare-*")]
    holders = [lock.holder for lock in locks if lock.is_held]
    return {holder[0] for holder in holders if holder is not None and holder[1] in states}


@contextmanager
def serve_environment(**environment: str) -> Iterator[None]:
    """Variables that every process of a Ray inherits which is started meanwhile, beside those that are advised."""
    environment |= {
        "RAY_SERVE_PROXY_USE_GRPC": "1",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "lorafleet.cluster.http.proxy.prepare",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a busy machine it needs more than 5
        "RAY_worker_niceness": "0",  # 15 unless set: other work on the machine would come first
    }
    saved = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def ray_cluster(**environment: str) -> Iterator[None]:
    """A Ray cluster of this machine alone; `environment` reaches every process of it."""
    with serve_environment(**environment):
        try:
            ray.init(
                address="local",
                namespace="serve",
                num_cpus=2,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                _system_config={"metrics_report_interval_ms": 1000},
            )
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


def args_for(root: Path) -> dict[str, Any]:
    """`args` of two small workers over the base and the adapters in `root`."""
    return {
        "model": {"id": BASE_ID, "source": str(root / "base"), "dtype": "float32"},
        "adapters": {
            "sources": [{"name": "demo", "kind": "directory", "root": str(root / "adapters")}],
            "pool_bytes": "512KiB",
            "host_cache_bytes": "32MiB",
            "state_dir": str(root / "state"),
        },
        "worker": {
            "num_replicas": 2,
            "max_running": 16,
            "max_queued_requests": 16,
            "kv_bytes": "4MiB",
            "spare_processes": 0,
        },
    }


@contextmanager
def live_service(root: Path, args: dict[str, Any], port: int | None = None) -> Iterator[LiveService]:
    """Deploy on the running Ray cluster, and take it down afterwards. Of several nodes, the first one has a proxy."""
    port = port or free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    service = LiveService(f"http://127.0.0.1:{port}", root, args)
    try:
        service.deploy()
        service.await_ready()
        yield service
    finally:
        service.http.close()
        serve.shutdown()
        eventually(lambda: not spares(STARTING, READY), 60.0)
