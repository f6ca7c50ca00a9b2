"""Starts the service of a Serve YAML on a Ray of its own, waits for it, and stops it again."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lorafleet.cluster.app import build
from lorafleet.cluster.config import AppConfig

ROOT = Path(__file__).parents[2]
APP_NAME = "lorafleet"
OBJECT_STORE_BYTES = 256 * 2**20
START_TIMEOUT_S = 240.0
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


@dataclass(frozen=True, slots=True)
class Service:
    """A service that is ready."""

    config: AppConfig
    url: str
    ray_address: str
    """Of the cluster, for callers by its handle."""
    start_s: float

    @property
    def api_key(self) -> str:
        """A key for the OpenAI client, which insists on one even where none is needed."""
        keys = self.config.auth.read_keys().api_keys
        return keys[0] if keys else "none"

    def admin(self) -> httpx.Client:
        """A client of the admin plane."""
        token = self.config.auth.read_keys().admin_token
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)


@contextmanager
def running_service(serve_yaml: Path, *, port: int | None, keep_state: bool) -> Iterator[Service]:
    """The service of `serve_yaml` while the block runs, on `port` (None: a free one) of loopback.

    Ray, its files and, unless `keep_state`, the adapter store's state live in a folder that goes away at the end.
    Raises RuntimeError when the service does not come up.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_USE_GRPC", "1")  # half the work a token on the way from ingress to client
    os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")  # and no hand-over between threads
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "lorafleet.cluster.http.proxy.prepare")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # on a busy machine it needs more than 5
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray import serve

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    port = _bindable(port or 0)
    url = f"http://127.0.0.1:{port}"
    # Sockets lie in this folder, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="lorafleet-", ignore_cleanup_errors=True) as folder:
        values: dict[str, Any] = {"config": str(serve_yaml)}
        if not keep_state:
            values["adapters.state_dir"] = f"{folder}/state"
        config = AppConfig.model_validate(values).resolved(ROOT)
        start = time.perf_counter()
        try:
            with Progress("starting Ray"):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                )
                serve.start(http_options={"host": "127.0.0.1", "port": port})
            with Progress("starting the service") as progress:
                serve.run_many(
                    [serve.RunTarget(build(config), name=APP_NAME, route_prefix="/")],
                    wait_for_ingress_deployment_creation=False,
                    wait_for_applications_running=False,
                )
                _await_ready(url, progress)
            yield Service(config, url, ray.get_runtime_context().gcs_address, time.perf_counter() - start)
        finally:
            with Progress("stopping the service"):
                ray.shutdown()  # and with it everything that runs on it


class Progress:
    """A line that shows what is under way and for how long; without a terminal, one line at the end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._detail = ""
        self._start = time.perf_counter()
        self._frame = 0

    def __enter__(self) -> Progress:
        self.show("")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lead = "\r\033[K" if sys.stdout.isatty() else ""
        print(f"{lead}{'✓' if kind is None else '✗'} {self._what}: {self._seconds:.1f} s", flush=True)

    def show(self, detail: str) -> None:
        """Say how far it is."""
        if sys.stdout.isatty():
            frame = FRAMES[self._frame % len(FRAMES)]
            self._frame += 1
            print(f"\r\033[K{frame} {self._what} {self._seconds:.0f} s  {detail}", end="", flush=True)
        elif detail != self._detail:
            print(f"  {self._what} {self._seconds:.0f} s  {detail}", flush=True)
        self._detail = detail

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._start


def _await_ready(url: str, progress: Progress) -> None:
    """Wait for GET /readyz, showing which deployments are up. Raises RuntimeError when that fails."""
    from ray import serve

    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(base_url=url, timeout=5) as client:
        while True:
            application = serve.status().applications.get(APP_NAME)
            if application is not None:
                if application.status.value == "DEPLOY_FAILED":
                    raise RuntimeError(f"the service cannot start: {application.message}")
                states = sorted((name, status.status.value) for name, status in application.deployments.items())
                progress.show(", ".join(f"{name} {state.lower()}" for name, state in states))
            try:
                if client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # the proxy is not up yet
            if time.monotonic() > deadline:
                raise RuntimeError(f"the service was not ready within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.1)


def _bindable(port: int) -> int:
    """`port`, or a free one for 0. Raises RuntimeError when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RuntimeError(f"port {port} is taken: choose another with --port") from error
        bound: int = probe.getsockname()[1]
        return bound
