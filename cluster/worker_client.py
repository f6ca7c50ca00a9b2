"""The workers as the dispatcher calls them: a stream of deltas for each sequence, without Ray's wrapping of errors."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from lorafleet.cluster.errors import NoWorker, Overloaded, WorkerGone, unwrap
from lorafleet.cluster.outcome import result_of
from lorafleet.cluster.whereabouts import worker_of
from lorafleet.workers.request import EngineRequest, GenerateDelta

_GONE = (RayActorError, WorkerCrashedError, ObjectLostError, TaskCancelledError)


class ServeWorkers:
    """Workers behind the handle of a `WorkerReplica` deployment, routed by `WorkerRouter`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._generate = handle.options(method_name="generate", stream=True)

    def generate(self, request: EngineRequest, excluded: frozenset[str]) -> ServeStream:
        """Start a sequence on the worker that the router chooses, not on one of `excluded` while there are others."""
        return ServeStream(self._generate.remote(request, excluded=excluded), request.request_id)


class ServeStream:
    """The deltas of one sequence on one worker."""

    def __init__(self, response: DeploymentResponseGenerator[GenerateDelta], request_id: str) -> None:
        self._response = response
        self._request_id = request_id

    @property
    def worker_id(self) -> str | None:
        """The worker that the router chose; None before it has."""
        return worker_of(self._request_id)

    async def next(self) -> GenerateDelta:
        """The next delta. Raises WorkerGone, Overloaded, NoWorker, or what the worker raised."""
        try:
            delta: GenerateDelta = result_of(await self._response.__anext__())
        except StopAsyncIteration:
            raise WorkerGone("the worker ended the stream before the answer") from None
        except asyncio.CancelledError:
            # Ray says so too when a worker's call was cancelled from elsewhere, say while the worker shuts down.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise WorkerGone("the worker dropped the request") from None
        except BackPressureError as error:
            raise Overloaded("too many requests wait for a worker", None, 1.0) from error
        except DeploymentUnavailableError as error:
            raise NoWorker("the workers cannot be started", None, 5.0) from error
        except _GONE as error:
            raise WorkerGone("the worker died") from error
        except Exception as error:
            cause = unwrap(error)
            if isinstance(cause, _GONE):
                raise WorkerGone("the worker died") from error
            if cause is error:
                raise
            raise cause from error
        return delta

    def cancel(self) -> None:
        """Stop the worker, or the wait for one."""
        with contextlib.suppress(Exception):  # Serve raises once more what kept the request from any worker
            self._response.cancel()
