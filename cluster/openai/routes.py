"""OpenAI's routes: models, completions and chat completions.

Parses, calls the dispatcher and writes the reply. What goes wrong before a reply has begun is raised, and `http.app`
gives it a status; after that it becomes one last event here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from lorafleet.cluster.errors import ModelNotFound, describe
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.bodies import read_body
from lorafleet.cluster.http.description import Responses, bearer, body_of, error_responses, events_of, replies
from lorafleet.cluster.http.request_ids import request_id_of
from lorafleet.cluster.http.sse import ClientGone, EventStream, while_connected
from lorafleet.cluster.openai.replies import ChatReply, CompletionReply, Reply
from lorafleet.cluster.openai.requests import DEFAULT_MAX_TOKENS, ChatBody, CompletionBody, neutral_of, parse_body
from lorafleet.cluster.openai.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ModelCard,
    ModelList,
)
from lorafleet.cluster.serving.dispatch import Dispatcher, PreparedRequest
from lorafleet.cluster.wire import NamedVersion
from lorafleet.workers.request import GenerateDelta

OWNER = "lorafleet"

CLIENT_CLOSED_REQUEST = 499
"""What proxies log for a client that hung up; nobody reads it."""


def build_router(dispatcher: Dispatcher, keys: Keys, *, started: int) -> APIRouter:
    """The data plane. started: Unix seconds, when the base came to be."""

    async def check_client(request: Request) -> None:
        request.state.caller = keys.check_client(request.headers.get("authorization"))

    router = APIRouter(
        prefix="/v1",
        dependencies=[Depends(check_client), *bearer("api_key", bool(keys.api_keys))],
        tags=["OpenAI"],
        responses=error_responses(HTTPStatus.UNAUTHORIZED, HTTPStatus.INTERNAL_SERVER_ERROR),
    )

    @router.get("/models", summary="The base and every adapter that has a name", responses=replies(ModelList))
    async def list_models() -> JSONResponse:
        adapters = await dispatcher.names.entries()
        cards = [_base_card(dispatcher, started), *(_adapter_card(dispatcher, entry) for entry in adapters)]
        return JSONResponse({"object": "list", "data": cards})

    @router.get(
        "/models/{model:path}",
        summary="One model",
        responses=replies(ModelCard) | error_responses(HTTPStatus.NOT_FOUND),
    )
    async def get_model(model: str) -> JSONResponse:
        if model == dispatcher.base_id:
            return JSONResponse(_base_card(dispatcher, started))
        name = dispatcher.adapter_name(model)
        for entry in await dispatcher.names.entries():
            if entry.name == name:
                return JSONResponse(_adapter_card(dispatcher, entry))
        raise ModelNotFound(f"no model or adapter is named {model[:128]!r}", "model")

    @router.post(
        "/completions",
        summary="Continue prompts",
        openapi_extra=body_of(CompletionBody, neutral_of(CompletionBody)),
        responses=_answers(Completion, CompletionChunk),
    )
    async def complete(request: Request) -> Response:
        body = parse_body(CompletionBody, await read_body(request))
        caller = request.state.caller
        prepared = [
            await dispatcher.prepare(each, caller=caller, default_max_tokens=DEFAULT_MAX_TOKENS)
            for each in body.requests()
        ]
        reply = CompletionReply(body, prepared, dispatcher.prompts, request_id_of(request))
        return await _answer(request, dispatcher, prepared, reply, is_stream=body.stream)

    @router.post(
        "/chat/completions",
        summary="Answer a conversation",
        openapi_extra=body_of(ChatBody, neutral_of(ChatBody)),
        responses=_answers(ChatCompletion, ChatCompletionChunk),
    )
    async def chat(request: Request) -> Response:
        body = parse_body(ChatBody, await read_body(request))
        prepared = [await dispatcher.prepare(body.request(dispatcher.prompts.answers), caller=request.state.caller)]
        reply = ChatReply(body, prepared, dispatcher.prompts, request_id_of(request))
        return await _answer(request, dispatcher, prepared, reply, is_stream=body.stream)

    return router


async def _answer(
    request: Request, dispatcher: Dispatcher, prepared: Sequence[PreparedRequest], reply: Reply, *, is_stream: bool
) -> Response:
    """Run the requests and answer, whole or as a stream.

    A stream begins with its first delta, so that what fails before it still has a status of its own.
    """
    deltas = dispatcher.stream(prepared, is_whole=not is_stream)
    try:
        if not is_stream:
            await while_connected(request.receive, _feed_all(reply, deltas))
            return Response(reply.whole(), media_type="application/json", headers=reply.headers())
        first = await while_connected(request.receive, anext(deltas))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    event = reply.chunk(first)
    assert event is not None
    return EventStream(_events(reply, event, deltas), reply.headers())


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
            # The status is long sent: an event is all that can still tell, and no [DONE] follows it.
            yield b"data: " + describe(error).body() + b"\n\n"
            return
        yield reply.end()


def _base_card(dispatcher: Dispatcher, created: int) -> dict[str, Any]:
    return {
        "id": dispatcher.base_id,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": dispatcher.base_id,
        "parent": None,
        "max_model_len": dispatcher.prompts.max_model_len,
    }


def _adapter_card(dispatcher: Dispatcher, entry: NamedVersion) -> dict[str, Any]:
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created_s,
        "owned_by": OWNER,
        "root": entry.root,
        "parent": dispatcher.base_id,
        "max_model_len": dispatcher.prompts.max_model_len,
        "lorafleet": {"version": entry.version},
    }


def _answers(whole: type[BaseModel], chunk: type[BaseModel]) -> Responses:
    """What the two routes that generate may answer."""
    return replies(whole, 200, content=events_of(chunk)) | error_responses(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
