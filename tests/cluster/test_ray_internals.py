"""The private names of Ray that the service leans on are where it expects them."""

from __future__ import annotations

import inspect

import ray
from ray import _raylet
from ray._private import ray_constants
from ray._private.workers import default_worker
from ray.core.generated import node_manager_pb2
from ray.serve import context, handle
from ray.serve.request_router import RequestRouter

from lorafleet.cluster.ray_internals import environment_with_hook, has_hook, has_token

MOVED = (
    f"ray {ray.__version__} moved {{}}; follow it in cluster/ray_internals.py, then raise the bound in pyproject.toml"
)


def test_the_router_hooks_are_there() -> None:
    hook = getattr(RequestRouter, "_choose_replica_for_request", None)
    assert hook is not None, MOVED.format("RequestRouter._choose_replica_for_request")
    assert list(inspect.signature(hook).parameters) == ["self", "pending_request", "is_retry"], MOVED.format(
        "the arguments of RequestRouter._choose_replica_for_request"
    )
    source = inspect.getsource(RequestRouter)
    for name in ("_deployment_id", "_replicas"):
        assert f"self.{name}" in source, MOVED.format(f"RequestRouter.{name}")
    for name in ("on_request_completed", "on_replica_actor_died", "update_replicas", "initialize_state"):
        assert hasattr(RequestRouter, name), MOVED.format(f"RequestRouter.{name}")


def test_handles_choose_how_answers_travel() -> None:
    parameters = inspect.signature(handle.DeploymentHandle.options).parameters
    source = inspect.getsource(handle.DeploymentHandle.options)
    assert "_by_reference" in parameters or "_by_reference" in source, MOVED.format("_by_reference")


def test_the_serve_client_says_where_http_listens() -> None:
    assert callable(getattr(context, "_get_global_client", None)), MOVED.format("serve.context._get_global_client")


def test_a_process_can_be_started_for_an_actor_to_come() -> None:
    methods = node_manager_pb2.DESCRIPTOR.services_by_name["NodeManagerService"].methods_by_name
    assert "PrestartWorkers" in methods, MOVED.format("NodeManagerService.PrestartWorkers")
    source = inspect.getsource(default_worker)
    for name in ("WORKER_PROCESS_SETUP_HOOK_ENV_VAR", "load_and_execute_setup_hook(", "--runtime-env-hash"):
        assert name in source, MOVED.format(name)
    [variable] = environment_with_hook("a.hook")["env_vars"]
    assert variable == ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR
    assert not has_hook("a.hook")


def test_ray_says_whether_it_has_a_token() -> None:
    for name in ("AuthenticationMode", "get_authentication_mode", "setproctitle"):
        assert hasattr(_raylet, name), MOVED.format(f"_raylet.{name}")
    assert isinstance(has_token(), bool)
