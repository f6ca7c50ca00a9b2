"""The probes that Kubernetes and load balancers ask. They need no key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
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
    """Whether requests are served."""

    status: Literal["ready", "starting"]
    reason: str | None = Field(default=None, description="What is waited for.")


def build_probes(not_ready: Callable[[], Awaitable[str | None]]) -> APIRouter:
    """The probes, which need no key. not_ready: what the service still waits for, None once it is ready."""
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
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "starting", "reason": reason}, 503, {"retry-after": "1"})

    return router
