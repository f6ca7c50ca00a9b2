"""Every error of every floor: what a client is told, and that it survives the way between processes."""

from __future__ import annotations

import inspect
import json
import pickle

import pytest
from ray.exceptions import RayTaskError

from lorafleet.adapter_store import errors as store_errors
from lorafleet.cluster import errors
from lorafleet.cluster.errors import ClusterError, describe, unwrap
from lorafleet.workers import errors as worker_errors

CLUSTER = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, ClusterError)]
STORE = [
    kind
    for kind in vars(store_errors).values()
    if inspect.isclass(kind) and issubclass(kind, store_errors.AdapterStoreError)
]


@pytest.mark.parametrize("kind", [kind for kind in CLUSTER if kind is not ClusterError], ids=lambda kind: kind.__name__)
def test_cluster_errors(kind: type[ClusterError]) -> None:
    error = kind("what is wrong", "field")
    error.retry_after_s = 1.2
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.code, again.param, again.retry_after_s) == ("what is wrong", error.code, "field", 1.2)
    reply = describe(again)
    assert (reply.status, reply.code) == (kind.status, error.code)
    assert reply.headers["retry-after"] == "2"
    assert json.loads(reply.body()) == {
        "error": {"message": "what is wrong", "type": kind.type, "param": "field", "code": error.code}
    }


@pytest.mark.parametrize("kind", STORE, ids=lambda kind: kind.__name__)
def test_store_errors(kind: type[store_errors.AdapterStoreError]) -> None:
    reply = describe(kind("rule", "what is wrong", "tensor"))
    status = {"invalid": 400, "not_found": 404, "refused": 422, "unavailable": 503, "internal": 503}[kind.kind]
    assert (reply.status, reply.code, reply.message, reply.param) == (status, "rule", "what is wrong", "tensor")
    assert ("retry-after" in reply.headers) == (status == 503)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (worker_errors.NoRoomError("ab" * 32, 5, 1, 3, 1, 5), 409, "no_room"),
        (worker_errors.AdapterUnavailable("cold"), 503, "adapter_unavailable"),
        (worker_errors.EngineFailed("stopped"), 503, "engine_failed"),
        (worker_errors.PromptTooLong("too long"), 400, "context_length_exceeded"),
        (worker_errors.InvalidTokenId("token id 9"), 400, "invalid_token_id"),
        (worker_errors.NonFiniteOutput("overflow"), 500, worker_errors.NonFiniteOutput.code),
        (worker_errors.UnsupportedModel("/models/secret"), 500, "internal_error"),
        (KeyError("/models/secret"), 500, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_worker_errors_and_bugs(error: Exception, status: int, code: str) -> None:
    for wrapped in (error, RayTaskError("f", "Traceback", error).as_instanceof_cause()):
        reply = describe(wrapped)
        assert (reply.status, reply.code) == (status, code)
        assert "secret" not in reply.message
        assert "Traceback" not in reply.message


def test_internal_errors_are_found_by_their_id(caplog: pytest.LogCaptureFixture) -> None:
    reply = describe(KeyError("lost"))
    [record] = caplog.records
    assert record.getMessage().removeprefix("internal error ") in reply.message
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


def test_unwrapping() -> None:
    cause = errors.StoreUnavailable("away", None, 2.0)
    once = RayTaskError("f", "Traceback", cause)
    assert unwrap(once) is cause
    assert unwrap(once.as_instanceof_cause()) is cause
    assert unwrap(RayTaskError("g", "Traceback", once)) is cause
    assert unwrap(cause) is cause
