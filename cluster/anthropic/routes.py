"""Anthropic's routes: messages, and how long their prompts are.

A body becomes a chat body, and its answer a message.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from lorafleet.cluster.anthropic.replies import MessageReply, error_of
from lorafleet.cluster.anthropic.requests import NEUTRAL, CountBody, MessagesBody
from lorafleet.cluster.anthropic.schemas import AnsweredMessage, AnthropicError, MessageEvent, TokenCount
from lorafleet.cluster.errors import describe
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.description import body_of, error_responses, events_of, replies
from lorafleet.cluster.http.guards import client_guard
from lorafleet.cluster.openai.answering import answer
from lorafleet.cluster.openai.requests import parsed
from lorafleet.cluster.openai.turns import Turn
from lorafleet.cluster.serving.dispatch import Dispatcher


class AnthropicRoute(APIRoute):
    """A route whose errors have Anthropic's body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook: what answers a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                reply = describe(error)
                body = {"type": "error", "error": error_of(reply)}
                return JSONResponse(body, reply.status, dict(reply.headers))

        return handle


def build_router(dispatcher: Dispatcher, keys: Keys) -> APIRouter:
    """The routes."""
    router = APIRouter(
        prefix="/v1",
        route_class=AnthropicRoute,
        dependencies=client_guard(keys, key_header="x-api-key"),
        tags=["Anthropic"],
        responses=error_responses(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.UNAUTHORIZED,
            HTTPStatus.NOT_FOUND,
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.INTERNAL_SERVER_ERROR,
            HTTPStatus.SERVICE_UNAVAILABLE,
            model=AnthropicError,
        ),
    )

    @router.post(
        "/messages",
        summary="Answer a conversation in Anthropic's form",
        openapi_extra=body_of(MessagesBody, NEUTRAL),
        responses=replies(AnsweredMessage, 200, content=events_of(MessageEvent, AnthropicError, has_end=False))
        | error_responses(
            HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.TOO_MANY_REQUESTS, model=AnthropicError
        ),
    )
    async def messages(request: Request) -> Response:
        body = await parsed(MessagesBody, request, dispatcher.prompts.threads, NEUTRAL)
        chat = body.chat()
        prepared = await dispatcher.prepare(
            chat.request(dispatcher.prompts.answers),
            caller=request.state.caller,
            # Clients write the bound of Anthropic's models, which is more than many a base's length.
            default_max_tokens=body.max_tokens,
        )
        reply = MessageReply(body, Turn(chat, prepared, dispatcher.prompts))
        return await answer(request, dispatcher, [prepared], reply, is_stream=body.stream)

    @router.post(
        "/messages/count_tokens",
        summary="How many tokens a conversation has in Anthropic's form",
        openapi_extra=body_of(CountBody, NEUTRAL),
        responses=replies(TokenCount),
    )
    async def count_tokens(request: Request) -> JSONResponse:
        body = await parsed(CountBody, request, dispatcher.prompts.threads, NEUTRAL)
        asked = body.chat().request(dispatcher.prompts.answers)
        adapter = await dispatcher.resolve(asked.model)
        assert asked.messages is not None
        own = None if adapter is None else adapter.chat
        text = await dispatcher.prompts.render(asked.messages, asked.template, own)
        vocabulary = await dispatcher.vocabulary_of(adapter)
        token_ids = await dispatcher.prompts.encode(text, "messages", add_special_tokens=False, vocabulary=vocabulary)
        return JSONResponse({"input_tokens": len(token_ids)})

    return router
