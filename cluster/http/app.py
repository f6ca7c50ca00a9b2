"""The HTTP application of the ingress: all routes, and OpenAI's error body for whatever goes wrong in them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafleet.cluster.errors import BadRequest, ClusterError, ErrorReply, MethodNotAllowed, RouteNotFound, describe
from lorafleet.cluster.http.description import DescribedApp
from lorafleet.cluster.http.entry import Entry
from lorafleet.cluster.http.incoming import BOUNDS, BoundedBodies, Bounds
from lorafleet.cluster.http.pages import Pages
from lorafleet.cluster.http.request_ids import HEADER, RequestIds
from lorafleet.cluster.validation import refusal_of

logger = logging.getLogger(__name__)

_NOT_JSON = BadRequest("the body is not valid JSON, or is nested too deeply", None, "invalid_json")
METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


def build_http_app(
    routers: Sequence[APIRouter],
    cors_origins: Sequence[str] = (),
    *,
    is_open: bool = False,
    bounds: Bounds = BOUNDS,
    names_requests: bool = True,
) -> FastAPI:
    """One application of these routers. cors_origins: whose pages a browser may let call it; `*`: all.

    is_open: nobody needs a secret, so pages of other origins are refused. bounds: of every body.
    names_requests: replies carry `x-request-id`, which Serve's proxy adds otherwise.
    """
    app = DescribedApp(title="lorafleet", docs_url=None, redoc_url=None, redirect_slashes=False)
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    if is_open:
        app.add_middleware(Pages, origins=cors_origins)
    app.add_middleware(BoundedBodies, bounds=bounds)
    app.add_middleware(ErrorReplies)
    if cors_origins:
        # Outside of the errors' replies, which a page could not read otherwise.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=list(METHODS),
            allow_headers=["*"],
            expose_headers=[HEADER, "retry-after", "x-lorafleet-version", "x-lorafleet-worker"],
        )
    if names_requests:
        app.add_middleware(RequestIds)
    app.add_middleware(Entry)
    return app


class ErrorReplies:
    """ASGI middleware: an exception that reaches it becomes a reply, unless one has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            if scope["path"].endswith("\n"):
                # Starlette's routes pass over it, and would take another name than the one that was sent.
                raise RouteNotFound(f"there is no {scope['method']} {scope['path'][:256]!a}")
            await self._app(scope, receive, noting_send)
        except Exception as error:
            reply = describe(error)
            if has_begun:
                # Only a bug comes here; the server cuts the connection, so nobody takes the reply for whole.
                raise
            await _response(reply)(scope, receive, send)


def _response(reply: ErrorReply) -> Response:
    return Response(reply.body(), reply.status, dict(reply.headers), "application/json")


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer errors of routing and of FastAPI."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:256]}"
    if isinstance(error.__cause__, ClusterError):
        reply = describe(error.__cause__)  # FastAPI's word for whatever keeps it from reading a body
    elif isinstance(error.__cause__, ValueError | RecursionError):
        reply = describe(_NOT_JSON)
    elif error.status_code == 404:
        reply = describe(RouteNotFound(f"there is no {where}"))
    elif error.status_code == 405:
        reply = describe(MethodNotAllowed(f"there is no {where}; the URL takes another method"))
    else:
        reply = ErrorReply(error.status_code, "invalid_request_error", "bad_request", str(error.detail))
    response = _response(reply)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(_methods_of(request))
    return response


def _methods_of(request: Request) -> list[str]:
    """Return the methods of a URL. Starlette's own reply names those of the path's first route only."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    routes = request.app.routes
    return [method for method in METHODS if any(route.matches(scopes[method])[0] is Match.FULL for route in routes)]


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    """Answer what FastAPI refuses in bodies and parameters of typed routes."""
    assert isinstance(error, RequestValidationError)
    found = [dict(each, loc=tuple(each["loc"])[1:]) for each in error.errors()]  # without "body" or "query"
    if found[0]["type"] == "json_invalid":
        return _response(describe(_NOT_JSON))
    if not found[0]["loc"] and found[0]["type"] in ("missing", "model_attributes_type"):
        message = "the body must be a JSON object, sent with content-type: application/json"
        return _response(describe(BadRequest(message, None, "invalid_json")))
    return _response(describe(refusal_of(found)))
