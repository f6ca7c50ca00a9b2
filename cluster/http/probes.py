"""The probes that Kubernetes and load balancers ask. They need no key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import Field

from lorafleet.cluster.http.description import replies
from lorafleet.workers.config import Settings


class Health(Settings):
    """The ingress lives."""

    status: Literal["ok"]


class Readiness(Settings):
    """Reply of the readiness probe."""

    status: Literal["ready", "starting"]
    reason: str | None = Field(default=None, description="What is waited for.")
    problems: dict[str, int] | None = Field(
        default=None,
        description="Codes of what is wrong with the adapter store's state folder, and how often, while requests are "
        "served: `store_full`, `store_not_writable`, `store_damaged`; and `user_config_refused`. "
        "GET /admin/v1/adapters names each.",
    )


async def no_problems() -> Mapping[str, int]:
    """Nothing is known to be wrong."""
    return {}


def build_probes(
    not_ready: Callable[[], Awaitable[str | None]], problems: Callable[[], Awaitable[Mapping[str, int]]] = no_problems
) -> APIRouter:
    """The probes, which need no key. not_ready: what the service still waits for, None once it is ready.

    problems: counts of what is wrong and does not keep requests from being served, by code.
    """
    router = APIRouter(tags=["probes"])

    @router.get("/healthz", summary="Whether the ingress lives", responses=replies(Health))
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get(
        "/readyz",
        summary="Whether workers are up and the preload is done",
        responses=replies(Readiness, 200, 503),
    )
    async def readyz() -> JSONResponse:
        reason = await not_ready()
        if reason is None:
            found = await problems()
            return JSONResponse({"status": "ready"} | ({"problems": dict(found)} if found else {}))
        return JSONResponse({"status": "starting", "reason": reason}, 503, {"retry-after": "1"})

    return router
