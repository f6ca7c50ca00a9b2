"""The whole service against its own description: schemathesis makes requests of it and holds the replies to it."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis.core.transport import Response
from schemathesis.engine import Status, events, from_schema

from lorafleet.adapter_store.names import NamedAdapter
from lorafleet.adapter_store.source_config import DirectoryConfig
from lorafleet.cluster.admin import routes as admin_routes
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.anthropic import routes as anthropic_routes
from lorafleet.cluster.config import NAME_PATTERN
from lorafleet.cluster.http.app import build_http_app
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.probes import build_probes
from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.openai import embeddings
from lorafleet.cluster.openai import routes as openai_routes
from lorafleet.cluster.openai.peer_routes import build_peer_router
from lorafleet.cluster.responses import routes as responses_routes
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.serving.exposition import Exposition
from lorafleet.cluster.serving.names import Names
from tests.cluster.fakes import FakeStore, FakeWorkers, make_prompts
from tests.cluster.fleets import DictFleet, DictStore, manifest_of
from tests.cluster.serving import BASE_ID, STARTED, no_counts
from tests.cluster.test_tools import answers_of

CLIENT, ADMIN = "client-key", "admin-token"
CONFIG = {
    "seed": 0,
    "continue-on-failure": True,
    "headers": {"Authorization": f"Bearer {ADMIN}"},
    "operations": [
        {
            "include-tag": ["OpenAI", "Anthropic"],
            "headers": {"Authorization": f"Bearer {CLIENT}"},
            # `wrong_bodies_are_refused` is this check with the lax values that vLLM takes too ("1" for 1).
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
    prompts.answers = answers_of("hermes", "think_tags")
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
            embeddings.build_router(dispatcher, keys),
            anthropic_routes.build_router(dispatcher, keys),
            responses_routes.build_router(dispatcher, keys),
            build_probes(not_ready),
            build_peer_router(dispatcher, keys, not_ready, Exposition(BASE_ID, no_counts)),
            admin_routes.build_router(rollout, keys),
        ]
    )


REASONS: tuple[tuple[str, str, str], ...] = (
    # What only the base knows.
    ("invalid_token_id", "", ""),
    ("context_length_exceeded", "", ""),
    # Which schemas, regular expressions and grammars can be followed.
    ("grammar_refused", "structured_outputs", "cannot be compiled"),
    # Relations between fields.
    ("invalid_value", r"structured_outputs|guided_\w+|response_format", "both say what the answer must be"),
    ("invalid_value", "structured_outputs", "exactly one of"),
    ("invalid_value", r"(response_format|text\.format)", "belongs to the type json_schema"),
    ("invalid_value", "tools", "exclude each other"),
    ("invalid_value", "tool_choice", "which is not in tools"),
    ("missing_parameter", r"tool_choice\.name", "is missing"),
    ("invalid_value", "messages", "send its tool_result"),
    ("invalid_value", "lora_path", "another adapter"),
    ("previous_response_not_found", "previous_response_id", "is stored"),
)
"""Why a body that its schema allows may be refused: code, field and words, each as a regular expression."""


@schemathesis.check
def wrong_bodies_are_refused(ctx: schemathesis.CheckContext, response: Response, case: schemathesis.Case[Any]) -> None:
    """A body that its schema does not allow is accepted only for values that are spelled as vLLM lets them."""
    if case.meta is None or not case.meta.generation.mode.is_negative or response.status_code >= 300:
        return
    content = case.operation.definition.raw.get("requestBody", {}).get("content", {})
    if "application/json" not in content or not isinstance(case.body, dict):
        return
    schema = content["application/json"]["schema"]
    if "$ref" in schema:
        return
    spelled = unlaxed(case.body, schema)
    error = next(jsonschema.Draft202012Validator(schema).iter_errors(spelled), None)
    assert error is None, f"accepted, although {error.message[:300] if error else ''}"


def unlaxed(value: Any, schema: dict[str, Any]) -> Any:
    """The value as its schema would have it spelled: a number for "1", true for "yes", 1 for true."""
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return {name: unlaxed(each, known[name]) if name in known else each for name, each in value.items()}
    for member in schema.get("enum", ()):
        kind = {bool: "boolean", int: "number", float: "number"}.get(type(member))
        found = unlaxed(value, {"type": kind}) if kind else value
        if type(found) is type(member) and found == member:
            return member
    for choice in schema.get("anyOf", ()):
        found = unlaxed(value, choice)
        if jsonschema.Draft202012Validator(choice).is_valid(found):
            return found
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [unlaxed(each, schema["items"]) for each in value]
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        return {name: unlaxed(each, schema["additionalProperties"]) for name, each in value.items()}
    if schema.get("type") == "boolean" and isinstance(value, str | int | float):
        return {"1": True, "0": False}.get(str(value).lower().removesuffix(".0"), TRUTHS.get(str(value).lower(), value))
    if schema.get("type") in ("integer", "number") and isinstance(value, str | bool | float):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else number
    return value


TRUTHS = {
    word: truth
    for truth, words in {True: "true t yes y on", False: "false f no n off"}.items()
    for word in words.split()
}
"""The words that pydantic takes for a switch."""


@schemathesis.check
def refusals_have_a_reason(ctx: schemathesis.CheckContext, response: Response, case: schemathesis.Case[Any]) -> None:
    """A body that the schema allows is refused only for what no schema can tell."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code not in (400, 413, 422):
        return
    if {"SGLang", "vLLM"} & set(case.operation.tags or ()):
        return  # 400 for whatever goes wrong
    error = response.json()["error"]
    is_about_several_fields = error["message"].startswith(f"{error['param']}=")
    has_reason = any(
        re.fullmatch(code, error["code"])
        and (not param or re.fullmatch(param, error["param"] or ""))
        and re.search(words, error["message"])
        for code, param, words in REASONS
    )
    assert has_reason or is_about_several_fields, error


@schemathesis.check
def errors_are_openais(ctx: schemathesis.CheckContext, response: Response, case: schemathesis.Case[Any]) -> None:
    """All of them, also where no route is; but SGLang's own."""
    if response.status_code < 400 or case.operation.label == "GET /readyz":
        return
    body = response.json()
    if "SGLang" in (case.operation.tags or ()) and "error" not in body:
        assert set(body) == {"success", "error_message", "loaded_adapters"}
    else:
        is_anthropics = "Anthropic" in (case.operation.tags or ()) and response.status_code != 405
        assert set(body) == ({"error", "type"} if is_anthropics else {"error"})
        assert set(body["error"]) == {"message", "type", "param", "code"}


@schemathesis.hook("before_call")
def use_likely_values(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Before a request is made: names that the service knows, where there is a text that it could take for one."""
    if isinstance(case.body, dict):
        for name, values in LIKELY.items():
            text = case.body.get(name)
            if isinstance(text, str) and text:
                case.body[name] = _one_of(values, text)
        may_stream = "stream" in str(case.operation.definition.raw.get("requestBody"))
        if case.body.get("model") == "shout" and may_stream and isinstance(case.body.get("stream", True), bool):
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
            run.media_types[label] |= {text.partition(";")[0] for text in response.headers.get("content-type", ())}
        for checks in event.recorder.checks.values():
            for check in checks:
                if check.status != Status.SUCCESS:
                    assert check.failure_info is not None
                    shown = f"{check.name}: {check.failure_info.failure}\n{check.failure_info.code_sample}"
                    run.failures[label][shown] += 1
    return run


@pytest.mark.slow
def test_every_reply_is_as_described(run: Run) -> None:
    found = [
        f"{label}, {count} times: {what}" for label, whats in run.failures.items() for what, count in whats.items()
    ]
    assert not found, "\n\n".join(found[:20])


@pytest.mark.slow
def test_no_operation_was_only_refused(run: Run) -> None:
    assert sum(count for statuses in run.statuses.values() for count in statuses.values()) > 1000
    assert {label for label, statuses in run.statuses.items() if not statuses[200]} == set()
    for label in ("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/messages", "POST /v1/responses"):
        assert run.media_types[label] == {"application/json", "text/event-stream"}
