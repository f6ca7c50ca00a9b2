"""POST /v1/responses: a body becomes a chat body, and its answer a response."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.bodies import ErrorBody
from lorafleet.cluster.http.description import body_of, events_of, replies
from lorafleet.cluster.http.guards import client_router
from lorafleet.cluster.openai.answering import answer, answer_errors
from lorafleet.cluster.openai.requests import parsed
from lorafleet.cluster.openai.turns import Turn
from lorafleet.cluster.responses.replies import ResponseReply
from lorafleet.cluster.responses.requests import NEUTRAL, ResponsesBody
from lorafleet.cluster.responses.schemas import ResponseEvent, ResponseObject
from lorafleet.cluster.serving.dispatch import Dispatcher


def build_router(dispatcher: Dispatcher, keys: Keys) -> APIRouter:
    """The route."""
    router = client_router(keys)

    @router.post(
        "/responses",
        summary="Answer a conversation in the form of OpenAI's Responses",
        openapi_extra=body_of(ResponsesBody, NEUTRAL),
        responses=replies(ResponseObject, 200, content=events_of(ResponseEvent, ErrorBody, has_end=False))
        | answer_errors(),
    )
    async def respond(request: Request) -> Response:
        body = await parsed(ResponsesBody, request, dispatcher.prompts.threads, NEUTRAL)
        chat = body.chat()
        prepared = await dispatcher.prepare(chat.request(dispatcher.prompts.answers), caller=request.state.caller)
        reply = ResponseReply(body, Turn(chat, prepared, dispatcher.prompts))
        return await answer(request, dispatcher, [prepared], reply, is_stream=body.stream)

    return router
