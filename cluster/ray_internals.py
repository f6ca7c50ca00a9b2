"""The names of Ray that are private, or whose behaviour no page of Ray's promises. No other module uses one.

`tests/cluster/test_ray_internals.py` fails with a sentence for each name that a new Ray moves.
"""

from __future__ import annotations

import asyncio
import os
import sys
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import JobID, _raylet
from ray._private import ray_constants
from ray._private.grpc_utils import init_grpc_channel
from ray._private.worker import global_worker
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

RETRY_PAUSE_S = 0.02
"""Pause before a call that a replica rejected (it is shutting down, or full) is sent again."""
PROBE_S = 5.0
"""How long a new replica may take to tell Serve its queue length, which decides nothing here."""
RAYLET_S = 10.0
"""How long the process that starts a node's processes may take to answer."""
KEEP_ALIVE_S = 10 * 365 * 86400
"""How long Ray leaves a spare process alone, which ends by itself when nobody needs it."""


class DirectRouter(RequestRouter):
    """A request router that chooses by itself, without asking replicas for their queue lengths.

    Serve's own queue of routing tasks, with its polls and back-off, stays empty.
    """

    queue_len_response_deadline_s = max_queue_len_response_deadline_s = PROBE_S

    @abstractmethod
    async def choose(self, request: PendingRequest, is_retry: bool) -> RunningReplica:
        """Choose the replica for one call. is_retry: a replica rejected the call before."""

    @property
    def deployment_id(self) -> Any:
        """The deployment whose replicas it chooses from."""
        return self._deployment_id

    @property
    def replicas(self) -> Mapping[ReplicaID, RunningReplica]:
        """The replicas that take calls now."""
        replicas: Mapping[ReplicaID, RunningReplica] = self._replicas
        return replicas

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's hook for one round of its own queue: any replica will do."""
        return [candidate_replicas]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Serve's hook for one call."""
        if is_retry:
            await asyncio.sleep(RETRY_PAUSE_S)
        return await self.choose(pending_request, is_retry)


def by_value(handle: DeploymentHandle[Any], **options: Any) -> DeploymentHandle[Any]:
    """The handle with answers over Serve's own gRPC channel, which costs half of what Ray's object store does."""
    return handle.options(_by_reference=False, **options)


def by_reference(handle: DeploymentHandle[Any], **options: Any) -> DeploymentHandle[Any]:
    """The handle with answers through Ray's object store, which hands on references to shared memory."""
    return handle.options(_by_reference=True, **options)


def http_hosts() -> tuple[str, ...]:
    """Return the hosts that this Serve instance's proxies bind; none if there is no HTTP."""
    client = _get_global_client()
    details = client.get_serve_details()
    host = client.http_config.host
    if host is None or str(details.get("proxy_location") or "").lower() in ("disabled", "noserver"):
        return ()
    return (host,)


def has_token() -> bool:
    """Return True if Ray admits only callers that have its token."""
    mode: Any = _raylet.get_authentication_mode()  # type: ignore[attr-defined]
    return bool(mode == _raylet.AuthenticationMode.TOKEN)  # type: ignore[attr-defined]


def environment_with_hook(hook: str) -> dict[str, Any]:
    """A runtime environment of actors in whose processes Ray calls `hook`, as `package.module.function`.

    It is called once Ray has connected the process, before that serves. Ray takes a hook for whole jobs only; this is
    the variable that it makes of it.
    """
    return {"env_vars": {ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook}}


def has_hook(hook: str) -> bool:
    """Return True if this process was started with the hook."""
    return os.environ.get(ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR) == hook


def start_spare_process() -> None:
    """Have this node start a process that runs nothing yet, for the next actor with this one's runtime environment.

    Rather than start one, Ray gives an actor a process that has its runtime environment and has run nothing. Blocks.
    Raises grpc.RpcError.
    """
    environment = ray.get_runtime_context().get_runtime_env_string()
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        runtime_env_info=runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=environment),
        keep_alive_duration_secs=KEEP_ALIVE_S,
        num_workers=1,
    )
    node = global_worker.node
    with init_grpc_channel(f"{node.node_ip_address}:{node.node_manager_port}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=RAYLET_S)


def is_spare_process() -> bool:
    """Return True in a process that `start_spare_process` has started: it belongs to no job when it starts."""
    no_job: str = JobID.nil().hex()
    return os.environ.get("RAY_JOB_ID") == no_job


def name_process(title: str) -> None:
    """Have `ps` show the title, until Ray gives the process to an actor."""
    _raylet.setproctitle(title)  # type: ignore[attr-defined]


def is_actor() -> bool:
    """Return True if this process has been given to an actor."""
    return not global_worker.actor_id.is_nil()


def folder_of_environment() -> Path:
    """A folder of this node that is shared by the processes of this one's runtime environment, and by no others."""
    told = (argument for argument in sys.argv if argument.startswith("--runtime-env-hash="))
    node_id = ray.get_runtime_context().get_node_id()
    name = f"lorafleet-{node_id[:16]}-{next(told, '').partition('=')[2]}"
    return Path(global_worker.node.get_session_dir_path()) / name
