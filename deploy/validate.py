"""Checks Serve configs without starting anything: `python -m lorafleet.deploy.validate FILE...`.

Reads Serve YAMLs, and Kubernetes manifests that hold one in a RayService. Checks Serve's own keys, `args` and the
ingress's `user_config`. Warns of settings that would fail only later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from lorafleet.cluster.config import AppConfig, UserConfig
from lorafleet.cluster.http.auth import is_loopback

IMPORT_PATH = "lorafleet.cluster.app:build"
SOLE = ("controller", "adapter_store")
DEPLOYMENTS = ("ingress", "worker", *SOLE)

Model = TypeVar("Model", bound=BaseModel)


class InvalidConfig(Exception):  # noqa: N818
    """A file that would not deploy; the message has a line for each reason."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A file that deploys."""

    applications: tuple[str, ...]
    warnings: tuple[str, ...]


def check_file(path: Path) -> Checked:
    """Check all Serve configs in a YAML file. Raises InvalidConfig."""
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidConfig(f"{path}: {error}") from error
    configs = [config for document in documents for config in _serve_configs(document)]
    if not configs:
        raise InvalidConfig(f"{path}: the file must have a Serve config (`applications`) or a RayService")
    checked = [check_config(config) for config in configs]
    return Checked(
        applications=tuple(name for each in checked for name in each.applications),
        warnings=tuple(warning for each in checked for warning in each.warnings),
    )


def _serve_configs(document: object) -> Iterator[object]:
    if not isinstance(document, Mapping):
        return
    if document.get("kind") == "RayService":
        spec = document.get("spec")
        text = spec.get("serveConfigV2") if isinstance(spec, Mapping) else None
        if not isinstance(text, str):
            raise InvalidConfig("RayService: spec.serveConfigV2 is missing")
        try:
            yield yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidConfig(f"RayService: spec.serveConfigV2: {error}") from error
    elif "apiVersion" not in document:
        yield document


def check_config(config: Any) -> Checked:
    """Check one Serve config. Raises InvalidConfig."""
    schema = _valid(ServeDeploySchema, config, "")
    host = schema.http_options.host
    names: list[str] = []
    owners: dict[Path, str] = {}
    warnings = _passed_over(ServeDeploySchema, config, "")
    for i, application in enumerate(schema.applications):
        where = f"applications.{i}."
        if application.import_path != IMPORT_PATH:
            continue
        names.append(application.name)
        warnings += _passed_over(ServeApplicationSchema, config["applications"][i], where)
        args = _valid(AppConfig, application.args, f"{where}args.")
        owner = owners.setdefault(args.state_dir, application.name)
        if owner != application.name:
            raise InvalidConfig(
                f"{where}args.adapters.state_dir: application {owner!r} has {args.state_dir} already: give each its own"
            )
        counts = {deployment.name: deployment.num_replicas for deployment in application.deployments}
        for name, scaled in (("worker", args.worker), ("ingress", args.ingress)):
            if "num_replicas" in scaled.model_fields_set and not isinstance(counts.get(name), int):
                warnings.append(
                    f"{where}args.{name}.num_replicas: a change of args restarts every deployment; num_replicas of the "
                    f"deployment {name!r} changes without that"
                )
        for j, deployment in enumerate(application.deployments):
            if deployment.name not in DEPLOYMENTS:
                raise InvalidConfig(
                    f"{where}deployments.{j}.name must be one of {', '.join(DEPLOYMENTS)}; got {deployment.name!r}"
                )
            given = deployment.model_dump(exclude_unset=True)
            if deployment.name in SOLE and (
                given.get("num_replicas", 1) != 1 or given.get("autoscaling_config") is not None
            ):
                raise InvalidConfig(
                    f"{where}deployments.{j}.num_replicas must be 1: there is one {deployment.name} of a service"
                )
            user_config = given.get("user_config")
            if user_config is not None and deployment.name != "ingress":
                raise InvalidConfig(f"{where}deployments.{j}.user_config: only the ingress takes one")
            if user_config is not None:
                desired = _valid(UserConfig, user_config, f"{where}deployments.{j}.user_config.")
                known = {source.name for source in args.adapters.sources}
                if args.model.id in (adapter.name for adapter in desired.adapters):
                    raise InvalidConfig(f"{where}deployments.{j}.user_config: {args.model.id!r} is the base's name")
                warnings += [
                    f"user_config wants {adapter.name!r} from {adapter.source!r}, which is not in adapters.sources"
                    for adapter in desired.adapters
                    if adapter.source not in known
                ]
        if host is not None and not is_loopback(host):
            warnings.append(
                f"HTTP is bound to {host}: the service starts only if {args.auth.admin_token_env} is set on the cluster"
            )
    if not names:
        raise InvalidConfig(f"no application has import_path: {IMPORT_PATH}")
    return Checked(tuple(names), tuple(warnings))


def _passed_over(model: type[BaseModel], values: Mapping[str, object], where: str) -> list[str]:
    """Serve says nothing of keys that it does not know."""
    return [
        f"{where}{key} is not a key of Serve's, and Serve ignores it" for key in values if key not in model.model_fields
    ]


def _valid(model: type[Model], values: Any, where: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        reasons = []
        for each in error.errors():
            place = f"{where}{'.'.join(str(part) for part in each['loc'])}".rstrip(".") or "the config"
            reasons.append(f"{place}: {each['msg'].removeprefix('Value error, ')}")
        raise InvalidConfig("\n".join(reasons)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the files; 0 if all of them would deploy."""
    parser = argparse.ArgumentParser(description="Check Serve configs without starting anything.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    num_invalid = 0
    for path in parser.parse_args(arguments).files:
        try:
            checked = check_file(path)
        except InvalidConfig as error:
            num_invalid += 1
            print(f"{path}: invalid\n  " + str(error).replace("\n", "\n  "), file=sys.stderr)
        else:
            print(f"{path}: valid ({', '.join(checked.applications)})")
            for warning in checked.warnings:
                print(f"  note: {warning}")
    return min(num_invalid, 1)


if __name__ == "__main__":
    sys.exit(main())
