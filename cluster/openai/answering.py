"""Runs prepared requests and answers in HTTP, whole or as a stream, in the form that a reply has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from http import HTTPStatus
from typing import Protocol

from fastapi import Request
from fastapi.responses import Response

from lorafleet.cluster.errors import ErrorReply, describe
from lorafleet.cluster.http.description import Responses, error_responses
from lorafleet.cluster.http.sse import ClientGone, EventStream, while_connected
from lorafleet.cluster.serving.dispatch import Dispatcher, PreparedRequest
from lorafleet.workers.request import GenerateDelta, GenerateRequest

CLIENT_CLOSED_REQUEST = 499
"""What proxies log for a client that hung up; nobody reads it."""


def answer_errors() -> Responses:
    """For `responses=` of a route that runs requests: what can be wrong with one."""
    return error_responses(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )


class Reply(Protocol):
    """One HTTP request's answer: fed with all deltas and then whole, or chunk by chunk and then an end."""

    def feed(self, delta: GenerateDelta) -> None:
        """Keep a delta for the whole reply."""
        ...

    def whole(self) -> bytes:
        """The whole reply as JSON."""
        ...

    def chunk(self, delta: GenerateDelta) -> bytes | None:
        """The events for a delta; None when nothing of it is to be seen yet, which the first one never is."""
        ...

    def end(self) -> bytes:
        """The events that end a stream."""
        ...

    def failure(self, error: ErrorReply) -> bytes:
        """The event that ends a stream whose status is long sent."""
        ...

    def headers(self) -> Mapping[str, str]:
        """Of the response."""
        ...


async def answer(
    request: Request, dispatcher: Dispatcher, prepared: Sequence[PreparedRequest], reply: Reply, *, is_stream: bool
) -> Response:
    """Run the requests and answer, whole or as a stream.

    A stream begins with its first delta, so that what fails before it still has a status of its own.
    """
    stream: EventStream | None = None

    def write(delta: GenerateDelta) -> bool:
        if stream is None or not stream.may_write:
            return False
        event = reply.chunk(delta)
        if event is not None:
            stream.write(event)
        return True

    deltas = dispatcher.stream(prepared, is_whole=not is_stream, sink=write)
    try:
        if not is_stream:
            await while_connected(request.receive, _feed_all(reply, deltas))
            may_be_long = any(_has_logprobs(each.request) for each in prepared)
            content = await asyncio.to_thread(reply.whole) if may_be_long else reply.whole()
            return Response(content, media_type="application/json", headers=reply.headers())
        first = await while_connected(request.receive, anext(deltas))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    event = reply.chunk(first)
    assert event is not None
    stream = EventStream(_events(reply, event, deltas), reply.headers())
    return stream


def _has_logprobs(request: GenerateRequest) -> bool:
    return request.logprobs is not None or request.prompt_logprobs


async def _feed_all(reply: Reply, deltas: AsyncGenerator[GenerateDelta, None]) -> None:
    async with aclosing(deltas):
        async for delta in deltas:
            reply.feed(delta)


async def _events(
    reply: Reply, first: bytes, deltas: AsyncGenerator[GenerateDelta, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(deltas):
        yield first
        try:
            async for delta in deltas:
                event = reply.chunk(delta)
                if event is not None:
                    yield event
        except Exception as error:
            yield reply.failure(describe(error))
            return
        yield reply.end()
