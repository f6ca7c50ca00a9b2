"""The names of Ray Serve that are private, or whose behaviour no page of Ray's promises. No other module uses one.

`tests/cluster/test_ray_internals.py` fails with a sentence for each name that a new Ray moves.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from ray import _raylet
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

RETRY_PAUSE_S = 0.02
"""Pause before a call that a replica rejected (it is shutting down, or full) is sent again."""
PROBE_S = 5.0
"""How long a new replica may take to tell Serve its queue length, which decides nothing here."""


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
