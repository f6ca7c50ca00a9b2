"""What a service may be told: the contract's keys, command-line overrides, paths, and errors that name the key."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.scripts import convert_args_to_dict

from lorafleet.cluster.app import build
from lorafleet.cluster.config import AppConfig, AuthConfig, UserConfig
from lorafleet.cluster.errors import EmptySecret

CONTRACT = """
model:    {id: demo, source: examples/demo/base, dtype: auto, max_model_len: 512}
adapters:
  sources: [{name: demo, kind: directory, root: examples/demo/adapters, resolve: true}]
  preload: [{name: shout, source: demo, key: shout, pinned: false}]
  max_rank: 64
  pool_bytes: auto
  host_cache_bytes: 1GiB
worker:   {num_replicas: 2, num_gpus: 0, device: auto, max_batch_tokens: 2048, max_running: 64, kv_bytes: auto}
auth:     {api_keys_env: LORAFLEET_API_KEYS, admin_token_env: LORAFLEET_ADMIN_TOKEN}
"""


def contract(**overrides: Any) -> dict[str, Any]:
    return {**yaml.safe_load(CONTRACT), **overrides}


def from_command_line(*arguments: str) -> AppConfig:
    return AppConfig.model_validate(convert_args_to_dict(arguments))


def test_the_contract_is_a_config() -> None:
    config = AppConfig.model_validate(contract())
    assert config.model.id == "demo"
    assert config.adapters.host_cache_bytes == 2**30
    assert config.adapters.preload[0].warm == 1
    assert config.adapters.pool.max_rank == 64
    assert config.worker.engine.max_running == 64
    assert config.worker.resolved_device == "cpu"


@pytest.mark.parametrize("part", ["", "model", "adapters", "worker", "auth"])
def test_unknown_keys_are_errors_that_name_the_key(part: str) -> None:
    values = contract()
    (values[part] if part else values)["nonsense"] = 1
    with pytest.raises(ValidationError, match=r"nonsense\n\s+Extra inputs are not permitted"):
        AppConfig.model_validate(values)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("adapters.host_cache_bytes", "1 elephant", "is not a size"),
        ("adapters.max_rank", 0, "adapters.max_rank"),
        ("adapters.preload", [{"name": "a//b", "source": "demo", "key": "k"}], "pattern"),
        ("adapters.preload", [{"name": "a", "source": "nowhere", "key": "k"}], "source 'nowhere'"),
        ("adapters.preload", [{"name": "a", "source": "demo", "key": "k", "warm": "some"}], "warm"),
        ("adapters.preload", [{"name": "a", "source": "demo", "key": k} for k in "kl"], "'a' is given twice"),
        ("adapters.sources", [{"name": "d", "kind": "directory", "root": r} for r in "ab"], "'d' is given twice"),
        ("adapters.sources", [{"name": "d", "kind": "ftp", "root": "x"}], "ftp"),
        ("worker.num_replicas", 0, "worker.num_replicas"),
        ("worker.max_running", "many", "worker.max_running"),
        ("worker", {"tensor_parallel_size": 3}, "worker.tensor_parallel_size"),
        ("worker", {"tensor_parallel_size": 4, "num_gpus": 2}, "num_gpus must be 4 for tensor_parallel_size=4.*got 2"),
        ("worker", {"tensor_parallel_size": 2, "device": "cuda:1"}, "device must be auto, cpu or cuda.*'cuda:1'"),
        ("worker", {"num_gpus": 1.5}, "num_gpus must be a whole number where it is over 1.*got 1.5"),
        ("worker", {"num_gpus": float("inf")}, "finite"),
        ("worker.stall_s", float("inf"), "finite"),
        ("worker.max_wait_s", float("nan"), "finite"),
        ("worker.drain_s", float("inf"), "finite"),
        ("adapters.sources", [{"name": "d", "kind": "directory", "root": "x", "timeout_s": float("inf")}], "finite"),
        ("worker.device", "tpu", "worker.device"),
        ("worker.max_running", 10**15, "less than or equal to 65536"),
        ("worker.kv_bytes", "9" * 400 + "TiB", "is not a size"),
        ("worker.kv_bytes", -1, "'-1' is not a size"),
        ("adapters.pool_bytes", 0, "'0' is not a size"),
        ("adapters.pool_bytes", True, "'True' is not a size"),
        ("model.dtype", "int8", "model.dtype"),
        ("model.id", "..", "is more than dots"),
        ("model.id", "a\nb", "all printable"),
        ("model.id", "模" * 67, "up to 200 bytes"),
        ("model.id", "shout", "'shout' is the base's name"),
        ("auth.admin_token_env", "LORAFLEET_API_KEYS", "must differ"),
        ("auth.api_keys_env", "A=B", "auth.api_keys_env"),
        ("config", 3, "config=3 cannot be read"),
        ("config", "/", "config=/ cannot be read"),
        ("adapters.preload", "[{name: ", "this is not YAML"),
        (3, 4, "3 is not the name of a setting"),
    ],
)
def test_wrong_values_are_refused(key: Any, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AppConfig.model_validate({**contract(), key: value})


def test_command_lines_reach_every_key() -> None:
    config = from_command_line(
        "model.id=demo",
        "model.source=examples/demo/base",
        "worker.num_replicas=3",
        "worker.prefix_cache=false",
        "worker.tensor_parallel_size=2",
        "adapters.pool_bytes=64MiB",
        "adapters.sources=[{name: demo, kind: directory, root: adapters}]",
        "adapters.preload=[{name: shout, source: demo, key: shout, warm: all}]",
        "auth={api_keys_env: KEYS}",
    )
    assert config.worker.num_replicas == 3
    assert config.worker.prefix_cache == "off"
    assert config.worker.tensor_parallel_size == 2
    assert config.adapters.pool_bytes == 64 * 2**20
    assert config.adapters.preload[0].warm == "all"
    assert config.auth.api_keys_env == "KEYS"


def test_command_lines_override_a_serve_yaml(tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    application = {"name": "lorafleet", "import_path": "lorafleet.cluster.app:build", "args": contract()}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    config = from_command_line(f"config={path}", "worker.num_replicas=1", "model.dtype=float32")
    assert config == AppConfig.model_validate(
        contract(model={**contract()["model"], "dtype": "float32"}, worker={**contract()["worker"], "num_replicas": 1})
    )
    path.write_text("applications: []")
    with pytest.raises(ValidationError, match="exactly one entry"):
        from_command_line(f"config={path}")


def test_serve_builds_four_deployments_of_a_mapping() -> None:
    application = call_user_app_builder_with_args_if_necessary(build, contract())
    built = build_app(application, name="lorafleet")
    assert {deployment.name for deployment in built.deployments} == {"ingress", "worker", "controller", "adapter_store"}
    assert built.ingress_deployment_name == "ingress"
    with pytest.raises(ValidationError, match="nonsense"):
        call_user_app_builder_with_args_if_necessary(build, contract(nonsense=1))


@pytest.mark.parametrize(
    ("spare_processes", "is_found", "has_hook"), [(1, True, True), (0, True, False), (1, False, False)]
)
def test_only_workers_with_processes_in_reserve_have_an_environment(
    spare_processes: int, is_found: bool, has_hook: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none without which Ray's hook finds the package, or no worker would start."""
    if not is_found:
        monkeypatch.setattr("sys.executable", shutil.which("false"))
    application = build(AppConfig.model_validate(contract(worker={"spare_processes": spare_processes})))
    deployments = build_app(application, name="lorafleet").deployments
    with_environment = {each.name for each in deployments if each.ray_actor_options.get("runtime_env")}
    assert with_environment == ({"worker"} if has_hook else set())


def test_local_paths_become_absolute_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "examples/demo/base").mkdir(parents=True)
    config = AppConfig.model_validate(contract()).resolved(tmp_path)
    assert config.model.source == str(tmp_path / "examples/demo/base")
    assert config.adapters.sources[0].root == tmp_path / "examples/demo/adapters"  # type: ignore[union-attr]
    assert config.state_dir.is_absolute()
    hub = AppConfig.model_validate(contract(model={"id": "m", "source": "org/model"})).resolved(tmp_path)
    assert hub.model.source == "org/model"


def test_a_home_that_is_not_known_is_named(tmp_path: Path) -> None:
    config = AppConfig.model_validate(contract(model={"id": "m", "source": "~nobody-here/base"}))
    with pytest.raises(ValueError, match="~nobody-here/base begins with a home that is not known"):
        config.resolved(tmp_path)


@pytest.mark.parametrize(
    ("worker", "device"),
    [
        ({}, "cpu"),
        ({"num_gpus": 1}, "cuda"),
        ({"num_gpus": 0.5, "device": "cpu"}, "cpu"),
        ({"device": "cuda:1"}, "cuda:1"),
        ({"tensor_parallel_size": 2}, "cpu"),
        ({"tensor_parallel_size": 2, "num_gpus": 2}, "cuda"),
    ],
)
def test_the_device_is_known_without_a_gpu(worker: dict[str, Any], device: str) -> None:
    assert AppConfig.model_validate(contract(worker=worker)).worker.engine.device == device


def test_user_config_is_a_set_of_adapters() -> None:
    config = UserConfig.model_validate({"adapters": [{"name": "a", "source": "demo", "key": "k", "pinned": True}]})
    assert config.adapters[0].pinned
    with pytest.raises(ValidationError, match="adapter"):
        UserConfig.model_validate({"adapter": []})


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AuthConfig(api_keys_env="KEYS", admin_token_env="TOKEN")
    monkeypatch.delenv("KEYS", raising=False)
    monkeypatch.delenv("TOKEN", raising=False)
    assert config.read_keys().api_keys == ()
    assert config.read_keys().admin_token is None
    monkeypatch.setenv("KEYS", " one, two ,,")
    monkeypatch.setenv("TOKEN", "secret ")
    keys = config.read_keys()
    assert keys.api_keys == ("one", "two")
    assert keys.admin_token == "secret"
    assert "secret" not in repr(keys)


@pytest.mark.parametrize("name", ["KEYS", "TOKEN"])
@pytest.mark.parametrize("value", ["", "  ", ",", " , ,"])
def test_a_variable_without_a_secret_opens_nothing(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    if name == "TOKEN" and "," in value:
        return  # a token may have a comma
    with pytest.raises(EmptySecret, match=f"{name} is set and holds no secret"):
        AuthConfig(api_keys_env="KEYS", admin_token_env="TOKEN").read_keys()
