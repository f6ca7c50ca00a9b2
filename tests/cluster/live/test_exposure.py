"""A service that others could reach, and nobody has a token for, does not start. Runs first: Serve is bound once."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus

from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.ingress import Ingress, take_http_app
from tests.cluster.live.service import APP, args_for, free_port
from tests.support.wait import eventually

pytestmark = pytest.mark.ray


def test_beyond_loopback_without_a_token_the_service_refuses_to_start_and_says_how(cluster: None, world: Path) -> None:
    """The ingress alone: it looks before it asks anything of other deployments."""
    config = AppConfig.model_validate({**args_for(world), "auth": {"admin_token_env": "NOBODY_HAS_SET_THIS"}})
    ingress = serve.deployment(name="ingress")(serve.ingress(take_http_app)(Ingress)).bind(config, None, None, None)

    def message() -> str:
        deployments = serve.status().applications[APP].deployments
        return deployments["ingress"].message if "ingress" in deployments else ""

    serve.start(http_options={"host": "0.0.0.0", "port": free_port()})
    try:
        serve.run_many(
            [serve.RunTarget(ingress, name=APP)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        eventually(lambda: "ExposedWithoutToken" in message(), 60.0)
        assert "HTTP is bound to 0.0.0.0, beyond loopback" in message()
        assert "set NOBODY_HAS_SET_THIS in the environment" in message()
        assert serve.status().applications[APP].status != ApplicationStatus.RUNNING
    finally:
        serve.shutdown()
