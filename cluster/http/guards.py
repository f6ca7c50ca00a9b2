"""Routers whose routes want a client's key."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Depends, Request
from fastapi.params import Depends as Dependency

from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.description import bearer, error_responses


def client_router(keys: Keys) -> APIRouter:
    """A router for OpenAI's routes, below /v1."""
    return APIRouter(
        prefix="/v1",
        dependencies=client_guard(keys),
        tags=["OpenAI"],
        responses=error_responses(HTTPStatus.UNAUTHORIZED, HTTPStatus.INTERNAL_SERVER_ERROR),
    )


def client_guard(keys: Keys, *, key_header: str | None = None) -> list[Dependency]:
    """For `dependencies=` of a router: its routes raise Unauthenticated without a key, and know their caller.

    key_header: a header that may hold the key in the place of `Authorization`. The caller is `request.state.caller`.
    """

    async def check_client(request: Request) -> None:
        key = None if key_header is None else request.headers.get(key_header)
        given = request.headers.get("authorization") if key is None else f"Bearer {key}"
        request.state.caller = keys.check_client(given)

    return [Depends(check_client), *bearer("api_key", bool(keys.api_keys))]
