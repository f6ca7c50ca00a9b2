"""The configs that we ship are valid, and what is wrong in a config is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeApplicationSchema

from lorafleet.deploy.validate import InvalidConfig, check_config, check_file, main

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*(ROOT / "deploy/serve").glob("*.yaml"), *(ROOT / "deploy/kuberay").glob("*.yaml")])


def local(**application: Any) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/serve/local.yaml").read_text())
    config["applications"][0] |= application
    return config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_we_ship_is_valid(path: Path) -> None:
    assert check_file(path).applications == ("lorafleet",)


def test_local_is_bound_to_loopback_and_needs_no_note() -> None:
    assert check_file(ROOT / "deploy/serve/local.yaml").warnings == ()
    config = local()
    config["http_options"]["host"] = "0.0.0.0"
    assert "LORAFLEET_ADMIN_TOKEN" in check_config(config).warnings[0]


def test_replicas_and_user_config_change_without_a_restart_and_args_do_not() -> None:
    """Serve restarts every deployment of an application whose code version changes."""

    def version_of(**application: Any) -> str:
        return str(get_app_code_version(ServeApplicationSchema.model_validate(local(**application)["applications"][0])))

    def deployments(count: int, *adapters: dict[str, str]) -> list[dict[str, Any]]:
        return [{"name": "worker", "num_replicas": count}, {"name": "ingress", "user_config": {"adapters": adapters}}]

    before = version_of(deployments=deployments(2))
    assert version_of(deployments=deployments(5)) == before
    assert version_of(deployments=deployments(2, {"name": "a", "source": "demo", "key": "a"})) == before
    args = local()["applications"][0]["args"]
    args["worker"]["num_replicas"] = 5
    assert version_of(deployments=deployments(2), args=args) != before


def test_replicas_in_args_alone_get_a_note() -> None:
    (note,) = check_config(local(deployments=[])).warnings
    assert "args.worker.num_replicas: a change of args restarts every deployment" in note


@pytest.mark.parametrize(
    ("application", "reason"),
    [
        ({"args": {}}, r"applications\.0\.args\.model: Field required"),
        ({"args": {"model": {"id": "a", "source": "b"}, "x": 1}}, r"applications\.0\.args\.x: Extra inputs"),
        (
            {"args": {"model": {"id": "a", "source": "b"}, "worker": {"tensor_parallel_size": 2, "num_gpus": 1}}},
            r"applications\.0\.args\.worker: .*num_gpus must be 2",
        ),
        ({"import_path": "other.app:build"}, "no application has import_path"),
        ({"deployments": [{"name": "workers"}]}, r"deployments\.0\.name must be one of ingress.*; got 'workers'"),
        ({"deployments": [{"name": "ingress", "user_config": {"a": 1}}]}, r"deployments\.0\.user_config\.a: Extra"),
        (
            {
                "deployments": [
                    {"name": "ingress", "user_config": {"adapters": [{"name": "demo", "source": "d", "key": "k"}]}}
                ]
            },
            r"deployments\.0\.user_config: 'demo' is the base's name",
        ),
        ({"deployments": [{"name": "worker", "user_config": {}}]}, r"deployments\.0\.user_config: only the ingress"),
        ({"deployments": [{"name": "adapter_store", "num_replicas": 2}]}, "must be 1: there is one adapter_store"),
        ({"deployments": [{"name": "controller", "autoscaling_config": {}}]}, "must be 1: there is one controller"),
    ],
)
def test_what_is_wrong_is_named(application: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidConfig, match=reason):
        check_config(local(**application))


def test_two_applications_have_a_state_each() -> None:
    config = local()
    config["applications"].append(config["applications"][0] | {"name": "other", "route_prefix": "/other"})
    with pytest.raises(
        InvalidConfig, match=r"applications\.1\..*state_dir: application 'lorafleet' has \.lorafleet already"
    ):
        check_config(config)


def test_keys_that_serve_passes_over_are_noted() -> None:
    assert "applications.0.user_config" in check_config(local(user_config={})).warnings[0]
    assert "nonsense" in check_config({**local(), "nonsense": 1}).warnings[0]


def test_a_user_config_from_an_unknown_source_is_noted() -> None:
    wanted = {"adapters": [{"name": "a", "source": "nowhere", "key": "k"}]}
    config = local(deployments=[{"name": "ingress", "user_config": wanted}])
    assert any("'nowhere'" in warning for warning in check_config(config).warnings)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: [",
        "[]",
        "kind: RayService\nspec: {}",
        "kind: RayService\nspec: {serveConfigV2: 'a: ['}",
        "apiVersion: v1\nkind: Secret",
    ],
)
def test_files_without_a_config_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InvalidConfig):
        check_file(path)


def test_main_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("applications: []")
    assert main([str(path) for path in SHIPPED]) == 0
    assert "valid (lorafleet)" in capsys.readouterr().out
    assert main([str(SHIPPED[0]), str(broken)]) == 1
    assert "no application has import_path" in capsys.readouterr().err
