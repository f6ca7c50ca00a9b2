"""Errors that callers expect, sent as values: Serve logs a traceback of whatever a replica raises."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from lorafleet.adapter_store.errors import AdapterStoreError
from lorafleet.cluster.errors import ClusterError
from lorafleet.workers.errors import WorkerError

EXPECTED = (AdapterStoreError, ClusterError, WorkerError)
"""What replicas raise of what callers did, or of what is not there now."""

Params = ParamSpec("Params")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Failure:
    """Came instead of a result."""

    error: Exception


def replying(method: Callable[Params, Awaitable[Result]]) -> Callable[Params, Awaitable[Result | Failure]]:
    """A replica's method that returns expected errors instead of raising them."""

    @functools.wraps(method)
    async def reply(*args: Params.args, **kwargs: Params.kwargs) -> Result | Failure:
        try:
            return await method(*args, **kwargs)
        except EXPECTED as error:
            return Failure(error)

    return reply


def result_of(reply: Result | Failure) -> Result:
    """What a method returned; raises what it would have raised."""
    if isinstance(reply, Failure):
        raise reply.error
    return reply
