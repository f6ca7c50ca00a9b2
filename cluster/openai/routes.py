"""OpenAI's routes: models, completions and chat completions.

Parses, calls the dispatcher and has the reply written. What goes wrong before a reply has begun is raised, and
`http.app` gives it a status; after that it becomes one last event.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from lorafleet.cluster.errors import ModelNotFound
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.description import Responses, body_of, error_responses, events_of, replies
from lorafleet.cluster.http.guards import client_router
from lorafleet.cluster.http.request_ids import request_id_of
from lorafleet.cluster.openai.answering import answer, answer_errors
from lorafleet.cluster.openai.replies import ChatReply, CompletionReply
from lorafleet.cluster.openai.requests import DEFAULT_MAX_TOKENS, ChatBody, CompletionBody, neutral_of, parsed
from lorafleet.cluster.openai.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ModelCard,
    ModelList,
)
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.wire import NamedVersion

OWNER = "lorafleet"


def build_router(dispatcher: Dispatcher, keys: Keys, *, started: int) -> APIRouter:
    """The data plane. started: Unix seconds, when the base came to be."""
    router = client_router(keys)

    @router.get(
        "/models",
        summary="The base and every adapter that has a name",
        responses=replies(ModelList) | error_responses(HTTPStatus.BAD_REQUEST),
    )
    async def list_models(
        limit: Annotated[int | None, Query(ge=1, description="Most adapters to list; all without it.")] = None,
        after: Annotated[
            str, Query(description="Begin with the first adapter behind this name, without the base.")
        ] = "",
    ) -> Response:
        adapters = await dispatcher.names.entries(after, limit)

        def written() -> bytes:
            cards = [] if after else [_base_card(dispatcher, started)]
            cards += (_adapter_card(dispatcher, entry) for entry in adapters)
            # Card by card: thousands of them would else keep the interpreter for one long call.
            return b'{"object":"list","data":[' + b",".join(json.dumps(card).encode() for card in cards) + b"]}"

        return Response(await asyncio.to_thread(written), media_type="application/json")

    @router.get(
        "/models/{model:path}",
        summary="One model",
        responses=replies(ModelCard) | error_responses(HTTPStatus.NOT_FOUND),
    )
    async def get_model(model: str) -> JSONResponse:
        if model == dispatcher.base_id:
            return JSONResponse(_base_card(dispatcher, started))
        entry = await dispatcher.names.entry(dispatcher.adapter_name(model))
        if entry is None:
            raise ModelNotFound(f"no model or adapter is named {model[:128]!r}; GET /v1/models lists them", "model")
        return JSONResponse(_adapter_card(dispatcher, entry))

    @router.post(
        "/completions",
        summary="Continue prompts",
        openapi_extra=body_of(CompletionBody, neutral_of(CompletionBody)),
        responses=_answers(Completion, CompletionChunk),
    )
    async def complete(request: Request) -> Response:
        body = await parsed(CompletionBody, request, dispatcher.prompts.threads)
        caller = request.state.caller
        prepared = [
            await dispatcher.prepare(each, caller=caller, default_max_tokens=DEFAULT_MAX_TOKENS)
            for each in body.requests()
        ]
        reply = CompletionReply(body, prepared, request_id_of(request))
        return await answer(request, dispatcher, prepared, reply, is_stream=body.stream)

    @router.post(
        "/chat/completions",
        summary="Answer a conversation",
        openapi_extra=body_of(ChatBody, neutral_of(ChatBody)),
        responses=_answers(ChatCompletion, ChatCompletionChunk),
    )
    async def chat(request: Request) -> Response:
        body = await parsed(ChatBody, request, dispatcher.prompts.threads)
        prepared = [await dispatcher.prepare(body.request(dispatcher.prompts.answers), caller=request.state.caller)]
        reply = ChatReply(body, prepared, dispatcher.prompts, request_id_of(request))
        return await answer(request, dispatcher, prepared, reply, is_stream=body.stream)

    return router


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
    """Replies of the two routes that generate."""
    return replies(whole, 200, content=events_of(chunk)) | answer_errors()
