"""Dependencies of routers whose routes want a client's key."""

from __future__ import annotations

from fastapi import Depends, Request
from fastapi.params import Depends as Dependency

from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.description import bearer


def client_guard(keys: Keys, *, key_header: str | None = None) -> list[Dependency]:
    """For `dependencies=` of a router: its routes raise Unauthenticated without a key, and know their caller.

    key_header: a header that may hold the key in the place of `Authorization`. The caller is `request.state.caller`.
    """

    async def check_client(request: Request) -> None:
        key = None if key_header is None else request.headers.get(key_header)
        given = request.headers.get("authorization") if key is None else f"Bearer {key}"
        request.state.caller = keys.check_client(given)

    return [Depends(check_client), *bearer("api_key", bool(keys.api_keys))]
