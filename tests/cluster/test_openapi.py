"""The whole service against its own description: schemathesis makes requests of it and holds the replies to it."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis.core.transport import Response
from schemathesis.engine import Status, events, from_schema

from lorafleet.adapter_store.names import NamedAdapter
from lorafleet.adapter_store.sources import DirectoryConfig
from lorafleet.cluster.admin import routes as admin_routes
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.config import NAME_PATTERN
from lorafleet.cluster.http.app import build_http_app
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.probes import build_probes
from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.openai import routes as openai_routes
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.serving.names import Names
from tests.cluster.fakes import FakeStore, FakeWorkers, make_prompts
from tests.cluster.fleets import DictFleet, DictStore, manifest_of
from tests.cluster.serving import BASE_ID, STARTED

CLIENT, ADMIN = "client-key", "admin-token"
CONFIG = {
    "seed": 0,
    "continue-on-failure": True,
    "headers": {"Authorization": f"Bearer {ADMIN}"},
    "operations": [
        {
            "include-tag": "OpenAI",
            "headers": {"Authorization": f"Bearer {CLIENT}"},
            # Lax values ("1" for 1) are accepted, as vLLM does, and not advertised.
            "checks": {"negative_data_rejection": {"enabled": False}},
        },
        {
            # With other methods the URL is that of an adapter called `.../pin`.
            "include-path-regex": "/(un)?pin$",
            "checks": {"unsupported_method": {"enabled": False}, "allow_header_conformance": {"enabled": False}},
        },
    ],
    "generation": {"max-examples": 15, "deterministic": True, "no-shrink": True, "database": "none"},
    "phases": {"stateful": {"enabled": False}},
    # `refusals_have_a_reason` is this check with the reasons that no schema can tell.
    "checks": {"positive_data_acceptance": {"enabled": False}},
}
LIKELY: dict[str, tuple[str, ...]] = {
    "model": (BASE_ID, "shout", f"{BASE_ID}:whisper", "nobody"),
    "source": ("demo", "other"),
    "key": ("a", "b", "none"),
    "lora_name": ("loud", "quiet"),
    "lora_path": ("a", "b", "none"),
}
"""Texts that mean something to the service, in place of others that mean nothing."""
NAMES = ("steady", "loud", "quiet", "nobody")


def whole_app(root: Path) -> FastAPI:
    """The routes that an ingress has, over workers and stores in memory. root: a folder of adapters."""
    keys = Keys((CLIENT,), ADMIN)
    prompts = make_prompts()
    dispatcher = Dispatcher(BASE_ID, prompts, Names(FakeStore()), FakeWorkers(prompts), RequestMetrics())
    manifest = manifest_of("a")
    sources = [DirectoryConfig(name="demo", root=root)]
    store = DictStore(keys={"a": manifest, "b": manifest_of("b")}, sources=sources)
    store.names["steady"] = NamedAdapter("steady", manifest.version, "demo", "a", False, 0, "admin", manifest=manifest)
    rollout = Rollout(store, DictFleet(store), reserved={BASE_ID})

    async def not_ready() -> str | None:
        return None

    return build_http_app(
        [
            openai_routes.build_router(dispatcher, keys, started=STARTED),
            build_probes(not_ready),
            admin_routes.build_router(rollout, keys),
        ]
    )


@schemathesis.check
def refusals_have_a_reason(ctx: schemathesis.CheckContext, response: Response, case: schemathesis.Case[Any]) -> None:
    """A body that the schema allows is refused only for what no schema can tell."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code not in (400, 413, 422):
        return
    if {"SGLang", "vLLM"} & set(case.operation.tags or ()):
        return  # 400 for whatever goes wrong
    error = response.json()["error"]
    depends_on_the_base = error["code"] in ("invalid_token_id", "context_length_exceeded")
    is_about_several_fields = error["message"].startswith(f"{error['param']}=")
    # Which grammars can be followed, and which tools there are to choose from, no schema can tell.
    names = ("structured_outputs", "response_format", "guided_", "tools", "tool_choice")
    is_about_the_answers_form = (error["param"] or "").startswith(names)
    assert depends_on_the_base or is_about_several_fields or is_about_the_answers_form, error


@schemathesis.check
def errors_are_openais(ctx: schemathesis.CheckContext, response: Response, case: schemathesis.Case[Any]) -> None:
    """All of them, also where no route is; but SGLang's own."""
    if response.status_code < 400 or case.operation.label == "GET /readyz":
        return
    body = response.json()
    if "SGLang" in (case.operation.tags or ()) and "error" not in body:
        assert set(body) == {"success", "error_message", "loaded_adapters"}
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}


@schemathesis.hook("before_call")
def use_likely_values(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Before a request is made: names that the service knows, where there is a text that it could take for one."""
    if isinstance(case.body, dict):
        for name, values in LIKELY.items():
            text = case.body.get(name)
            if isinstance(text, str) and text:
                case.body[name] = _one_of(values, text)
        if case.body.get("model") == "shout" and isinstance(case.body.get("stream", True), bool):
            case.body["stream"] = True
    in_path = (case.path_parameters or {}).get("name")
    if isinstance(in_path, str) and re.fullmatch(NAME_PATTERN, in_path):
        names = NAMES[1:] if case.method == "DELETE" else NAMES
        case.path_parameters["name"] = _one_of(names, in_path)


def _one_of(values: tuple[str, ...], text: str) -> str:
    return values[zlib.crc32(text.encode()) % len(values)]


@dataclass
class Run:
    """What schemathesis found, and what it was answered."""

    failures: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Of each operation: what, and how often."""
    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    media_types: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("adapters")
    for key in "ab":
        (root / key).mkdir()
    schema = schemathesis.openapi.from_asgi(
        "/openapi.json", whole_app(root), config=schemathesis.Config.from_dict(CONFIG)
    )
    run = Run()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            run.failures["schemathesis"][str(event)] += 1
        if not isinstance(event, events.ScenarioFinished):
            continue
        label = event.recorder.label
        for interaction in event.recorder.interactions.values():
            response = interaction.response
            assert response is not None
            run.statuses[label][response.status_code] += 1
            run.media_types[label] |= {text.partition(";")[0] for text in response.headers["content-type"]}
        for checks in event.recorder.checks.values():
            for check in checks:
                if check.status != Status.SUCCESS:
                    assert check.failure_info is not None
                    shown = f"{check.name}: {check.failure_info.failure}\n{check.failure_info.code_sample}"
                    run.failures[label][shown] += 1
    return run


def test_every_reply_is_as_described(run: Run) -> None:
    found = [
        f"{label}, {count} times: {what}" for label, whats in run.failures.items() for what, count in whats.items()
    ]
    assert not found, "\n\n".join(found[:20])


def test_no_operation_was_only_refused(run: Run) -> None:
    assert sum(count for statuses in run.statuses.values() for count in statuses.values()) > 1000
    assert {label for label, statuses in run.statuses.items() if not statuses[200]} == set()
    for label in ("POST /v1/completions", "POST /v1/chat/completions"):
        assert run.media_types[label] == {"application/json", "text/event-stream"}
