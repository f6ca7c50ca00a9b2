"""A service that others could reach, and nobody has a token for, does not start. Runs first: Serve is bound once."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus

from tests.cluster.live.service import APP, args_for, deployed, eventually

pytestmark = pytest.mark.ray


def test_beyond_loopback_without_a_token_the_service_refuses_to_start_and_says_how(cluster: None, world: Path) -> None:
    args = {**args_for(world), "auth": {"admin_token_env": "NOBODY_HAS_SET_THIS"}}
    args["worker"] = {**args["worker"], "num_replicas": 1}

    def message() -> str:
        deployments = serve.status().applications[APP].deployments
        return deployments["ingress"].message if "ingress" in deployments else ""

    with deployed(world, args, host="0.0.0.0"):
        eventually(lambda: "ExposedWithoutToken" in message(), 120.0)
        assert "HTTP is bound to 0.0.0.0, beyond loopback" in message()
        assert "set NOBODY_HAS_SET_THIS in the environment" in message()
        assert serve.status().applications[APP].status != ApplicationStatus.RUNNING
