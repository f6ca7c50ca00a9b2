"""vLLM's routes that clients ask beside OpenAI's: health, version, metrics, tokenising."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from importlib.metadata import version

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import AddedToken, PreTrainedTokenizerBase

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.description import body_of, error_responses, replies
from lorafleet.cluster.http.guards import client_guard
from lorafleet.cluster.openai.messages import rendered
from lorafleet.cluster.openai.peer_schemas import (
    DetokenizeBody,
    DetokenizeReply,
    TokenizeBody,
    TokenizeReply,
    TokenizerInfo,
    VersionReply,
)
from lorafleet.cluster.openai.requests import parsed
from lorafleet.cluster.openai.writing import written
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.serving.exposition import Exposition

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "chat_template": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
"""vLLM's fields of /tokenize that have no effect here, and their values without one."""


def build_peer_router(
    dispatcher: Dispatcher, keys: Keys, not_ready: Callable[[], Awaitable[str | None]], exposition: Exposition
) -> APIRouter:
    """The routes. not_ready: what the service still waits for, None once it is ready."""
    router = APIRouter(tags=["vLLM's data plane"])

    async def health() -> Response:
        return Response(status_code=200 if await not_ready() is None else 503)

    empty = {200: {"description": "Ready."}, 503: {"description": "Not yet."}}
    for path, methods in (("/health", ["GET"]), ("/ping", ["GET", "POST"])):
        for method in methods:
            router.add_api_route(
                path,
                health,
                methods=[method],
                summary="Whether requests are served; no body",
                responses=empty,  # type: ignore[arg-type]
                response_class=Response,
                operation_id=f"{method.lower()}_{path[1:]}",
            )

    @router.get("/version", summary="The version of lorafleet", responses=replies(VersionReply))
    async def get_version() -> JSONResponse:
        return JSONResponse({"version": version("lorafleet")})

    @router.get(
        "/metrics",
        summary="What all workers have served, as Prometheus reads it, under vLLM's names",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
    )
    async def metrics() -> Response:
        return Response(await exposition.text(), media_type=CONTENT_TYPE_LATEST)

    router.include_router(_tokenizing(dispatcher, keys))
    return router


def _tokenizing(dispatcher: Dispatcher, keys: Keys) -> APIRouter:
    """The routes of the tokenizer, which want a client's key."""
    router = APIRouter(
        dependencies=client_guard(keys),
        tags=["OpenAI"],
        responses=error_responses(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.UNAUTHORIZED,
            HTTPStatus.NOT_FOUND,
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.INTERNAL_SERVER_ERROR,
            HTTPStatus.SERVICE_UNAVAILABLE,
        ),
    )

    @router.post(
        "/tokenize",
        summary="Token ids of a text or a conversation",
        openapi_extra=body_of(TokenizeBody, NEUTRAL),
        responses=replies(TokenizeReply),
    )
    async def tokenize(request: Request) -> Response:
        body = await parsed(TokenizeBody, request, dispatcher.prompts.threads, NEUTRAL)
        adapter = None if body.model is None else await dispatcher.resolve(body.model)
        prompts, vocabulary = dispatcher.prompts, await dispatcher.vocabulary_of(adapter)
        if body.messages is not None:
            own = None if adapter is None else adapter.chat
            text = await prompts.render(rendered(body.messages), body.template(), own)
            param, adds_special = "messages", bool(body.add_special_tokens)
        else:
            assert body.prompt is not None
            text, param, adds_special = body.prompt, "prompt", body.add_special_tokens is not False
        token_ids = await prompts.encode(
            text, param, add_special_tokens=adds_special, may_be_empty=True, vocabulary=vocabulary
        )

        def reply() -> bytes:
            return written(
                {
                    "count": len(token_ids),
                    "max_model_len": prompts.max_model_len,
                    "tokens": list(token_ids),
                    "token_strs": list(map(vocabulary.token_of, token_ids)) if body.return_token_strs else None,
                },
                depth=1,
            )

        return Response(await asyncio.to_thread(reply), media_type="application/json")

    @router.post(
        "/detokenize",
        summary="The text of token ids",
        openapi_extra=body_of(DetokenizeBody, {}),
        responses=replies(DetokenizeReply),
    )
    async def detokenize(request: Request) -> JSONResponse:
        body = await parsed(DetokenizeBody, request, dispatcher.prompts.threads, {})
        adapter = None if body.model is None else await dispatcher.resolve(body.model)
        vocabulary = await dispatcher.vocabulary_of(adapter)
        return JSONResponse({"prompt": await asyncio.to_thread(vocabulary.decode, body.tokens)})

    @router.get(
        "/tokenizer_info", summary="The tokenizer's special tokens and settings", responses=replies(TokenizerInfo)
    )
    async def tokenizer_info() -> JSONResponse:
        prompts = dispatcher.prompts
        if prompts.tokenizer is None:
            raise BadRequest("the base has no tokenizer", None, "no_tokenizer")
        return JSONResponse(_info_of(prompts.tokenizer) | {"model_max_length": prompts.max_model_len})

    return router


def _info_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Settings that are plain values, without those that say where files lie."""
    settings = {
        name: str(each) if isinstance(each, AddedToken) else each for name, each in tokenizer.init_kwargs.items()
    }
    plain = {
        name: each
        for name, each in settings.items()
        if isinstance(each, bool | int | float | str | None) and not name.endswith(("_file", "_path", "name_or_path"))
    }
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")}
    template = tokenizer.chat_template
    own = {
        "tokenizer_class": type(tokenizer).__name__,
        "chat_template": template if isinstance(template, str) else None,
    }
    return plain | special | own
