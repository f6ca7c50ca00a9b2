"""Waits for the answer of one replica and raises the service's own errors instead of Ray's."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentResponse

from lorafleet.cluster.errors import ClusterError, unwrap
from lorafleet.cluster.wire import result_of


async def answer_of(
    response: DeploymentResponse[Any], timeout_s: float, *, late: ClusterError, away: ClusterError
) -> Any:
    """The result of a call. Raises what the method raised, `late` after `timeout_s`, or `away` if the replica died."""
    try:
        async with asyncio.timeout(timeout_s):
            return result_of(await response)
    except TimeoutError:
        response.cancel()
        raise late from None
    except RayTaskError as error:
        raise unwrap(error) from error
    except (RayActorError, DeploymentUnavailableError, AioRpcError) as error:
        raise away from error
