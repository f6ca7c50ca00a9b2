"""Bodies that every route shares: reading a request's within bounds, and the body of an error."""

from __future__ import annotations

from fastapi import Request
from pydantic import Field

from lorafleet.cluster.errors import BodyTooLarge
from lorafleet.workers.config import Settings

MAX_BODY_BYTES = 16 * 2**20


class ErrorDetail(Settings):
    """What went wrong."""

    message: str = Field(description="For people; carries no paths of the server.")
    type: str
    param: str | None = Field(description="The field at fault, where there is one.")
    code: str = Field(description="For programs, and stable.")


class ErrorBody(Settings):
    """Any error."""

    error: ErrorDetail


async def read_body(request: Request) -> bytes:
    """The body. Raises BodyTooLarge as soon as it is over the bound, without reading on."""
    too_large = f"the body is over {MAX_BODY_BYTES} bytes"
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise BodyTooLarge(too_large)
    chunks, num_bytes = [], 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise BodyTooLarge(too_large)
        chunks.append(chunk)
    return b"".join(chunks)
