"""Errors of the service, and the one place that turns the errors of every floor into what a client is told.

    ClusterError
    ├── BadRequest                 400, any code
    │   └── ContextLengthExceeded  400
    ├── BodyTooLarge               413
    ├── BodyTooSlow                408
    ├── Unauthenticated            401
    ├── Forbidden                  403
    ├── ModelNotFound              404
    ├── RouteNotFound              404
    ├── MethodNotAllowed           405
    ├── AdapterDoesNotFit          409
    ├── NameTaken                  409
    ├── Overloaded                 429, Retry-After
    ├── ServiceUnavailable         503, Retry-After
    │   ├── StoreUnavailable
    │   ├── ControllerUnavailable
    │   ├── NoWorker
    │   ├── IngressLost
    │   └── RolloutFailed
    ├── WorkerGone                 502, another worker is tried
    ├── StreamBroken               502
    ├── ExposedWithoutToken        the service does not start
    └── EmptySecret                the service does not start

Errors of the store and of the workers keep their own `code`; `describe` gives them a status.
"""

# ruff: noqa: N818

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ray.exceptions import RayTaskError

from lorafleet.adapter_store.errors import AdapterStoreError, ErrorKind
from lorafleet.workers.errors import (
    AdapterUnavailable,
    EngineFailed,
    GrammarRefused,
    InvalidTokenId,
    NonFiniteOutput,
    NoRoomError,
    PoolingUnsupported,
    PromptTooLong,
    WorkerError,
)

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "internal_error"
"""Code of whatever is none of ours."""


class ClusterError(Exception):
    """Base of the service's own errors. `message` is for the client: our words, no paths.

    `param` names the offending field; `retry_after_s` tells the client when another try may help. Survives pickling.
    """

    status: ClassVar[int]
    type: ClassVar[str] = "invalid_request_error"
    retryable_elsewhere: ClassVar[bool] = False
    """Whether another worker may do what this one could not."""
    code: str

    def __init__(self, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, param, retry_after_s)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class BadRequest(ClusterError):
    """A field that cannot be served: `code` says which rule it breaks."""

    status = 400

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message, param)
        self.args = (message, param, code)
        self.code = code


class ContextLengthExceeded(BadRequest):
    """Prompt plus answer do not fit the model's length."""

    def __init__(self, message: str, param: str | None = "messages", code: str = "context_length_exceeded") -> None:
        super().__init__(message, param, code)


class BodyTooLarge(ClusterError):
    """The request body is over the bound."""

    status = 413
    code = "body_too_large"


class BodyTooSlow(ClusterError):
    """The request body did not come in time."""

    status = 408
    code = "body_too_slow"


class Unauthenticated(ClusterError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ClusterError):
    """A key that is right, but not for this route."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class ModelNotFound(ClusterError):
    """A name that is neither a base nor an adapter. Nothing falls back to the base."""

    status = 404
    code = "model_not_found"


class RouteNotFound(ClusterError):
    """No such URL."""

    status = 404
    code = "unknown_url"


class MethodNotAllowed(ClusterError):
    """The URL exists, for another method."""

    status = 405
    code = "method_not_allowed"


class AdapterDoesNotFit(ClusterError):
    """A worker that must have an adapter has no room for it beside what it must keep."""

    status = 409
    type = "conflict_error"
    code = "no_room"


class NameTaken(ClusterError):
    """A load that must not replace found the name loaded; vLLM's and SGLang's routes say so in their words."""

    status = 409
    type = "conflict_error"
    code = "name_taken"


class Overloaded(ClusterError):
    """More requests wait than `max_queued_requests`."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class ServiceUnavailable(ClusterError):
    """Not now; another try may succeed."""

    status = 503
    type = "server_error"
    code = "service_unavailable"


class StoreUnavailable(ServiceUnavailable):
    """The adapter store is away and what was asked needs it."""

    code = "store_unavailable"
    retryable_elsewhere = True


class ControllerUnavailable(ServiceUnavailable):
    """The controller is away and what was asked needs it. Generating does not."""

    code = "controller_unavailable"


class NoWorker(ServiceUnavailable):
    """No worker could take the request, after every try."""

    code = "no_worker"


class RolloutFailed(ServiceUnavailable):
    """A worker that must have an adapter could not take it; what was served before is still served."""

    code = "rollout_failed"


class IngressLost(ServiceUnavailable):
    """The ingress died before it answered. Serve's proxy says so for calls that it cannot make again by itself."""

    code = "ingress_lost"


class WorkerGone(ClusterError):
    """A worker died, or was cut off, with a request on it."""

    status = 502
    type = "server_error"
    code = "worker_gone"
    retryable_elsewhere = True


class StreamBroken(ClusterError):
    """A worker or an ingress was lost in the middle of a stream. What was streamed is right; the rest is missing."""

    status = 502
    type = "server_error"
    code = "stream_broken"


class ExposedWithoutToken(ClusterError):
    """HTTP is bound beyond loopback while the admin plane, or Ray itself, has no token."""

    status = 500
    type = "server_error"
    code = "exposed_without_token"


class EmptySecret(ClusterError):
    """A variable that is to hold secrets is set, and holds none: it would leave open what it was to close."""

    status = 500
    type = "server_error"
    code = "empty_secret"


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as a client gets it: status, OpenAI's body and headers."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """OpenAI's error body as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def unwrap(error: BaseException) -> BaseException:
    """The error that a worker or the store raised, out of Ray's wrapping."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error


def describe(error: BaseException) -> ErrorReply:
    """Turn `error` into a reply. An error of another package is logged under an id, and the client gets the id."""
    error = unwrap(error)
    if isinstance(error, ClusterError):
        headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        if isinstance(error, Unauthenticated):
            headers["www-authenticate"] = "Bearer"
        return ErrorReply(error.status, error.type, error.code, error.message, error.param, headers)
    if isinstance(error, AdapterStoreError):
        status = _STORE_STATUS[error.kind]
        return ErrorReply(status, _type_of(status), error.code, error.message, error.param, _headers_of(status))
    if isinstance(error, tuple(_WORKER_STATUS)):
        assert isinstance(error, WorkerError)
        status = next(status for kind, status in _WORKER_STATUS.items() if isinstance(error, kind))
        return ErrorReply(status, _type_of(status), error.code, str(error), None, _headers_of(status))
    error_id = uuid.uuid4().hex[:12]
    logger.error("internal error %s", error_id, exc_info=error)
    return ErrorReply(500, "server_error", INTERNAL_ERROR, f"internal error; the log has it under {error_id}")


_STORE_STATUS: Mapping[ErrorKind, int] = {
    "invalid": 400,
    "not_found": 404,
    "refused": 422,
    "unavailable": 503,
    "internal": 503,
}

_WORKER_STATUS: Mapping[type[WorkerError], int] = {
    PromptTooLong: 400,
    InvalidTokenId: 400,
    GrammarRefused: 400,
    PoolingUnsupported: 400,
    NoRoomError: 409,
    NonFiniteOutput: 500,
    AdapterUnavailable: 503,
    EngineFailed: 503,
}


@dataclass(frozen=True, slots=True)
class KnownError:
    """An error that a client may get, for the documentation."""

    status: int
    type: str
    codes: tuple[str, ...]
    meaning: str


def known_errors() -> Iterator[KnownError]:
    """Every error of every floor that reaches clients under a code of its own."""
    for error in _descendants(ClusterError):
        if hasattr(error, "code") and error not in (ExposedWithoutToken, EmptySecret):
            yield KnownError(error.status, error.type, (error.code,), _first_paragraph(error))
    for kind, status in _WORKER_STATUS.items():
        yield KnownError(status, _type_of(status), (kind.code,), _first_paragraph(kind))
    for refusal in _descendants(AdapterStoreError):
        # Their codes stand before the meaning; those of AdapterRefused are the rules.
        codes, _, meaning = _first_paragraph(refusal).partition(": ")
        if codes.startswith("`"):
            status = _STORE_STATUS[refusal.kind]
            yield KnownError(status, _type_of(status), tuple(re.findall(r"`(\w+)`", codes)), meaning)
    yield KnownError(
        500, "server_error", (INTERNAL_ERROR,), "A bug; the message has the id under which the log has it."
    )


def _descendants(error: type[Exception]) -> Iterator[Any]:
    """The service's own: Ray derives a class from each error that it carries to a caller."""
    for child in error.__subclasses__():
        if child.__module__.startswith("lorafleet."):
            yield child
        yield from _descendants(child)


def _first_paragraph(thing: type) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _type_of(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def _headers_of(status: int) -> Mapping[str, str]:
    return {"retry-after": "2"} if status == 503 else {}
