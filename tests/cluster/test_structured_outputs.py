"""Structured output through the stock client, over a worker, judged by jsonschema and pydantic."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict

from lorafleet.workers.grammars import Grammars, Matcher
from lorafleet.workers.request import StructuredOutputs
from tests.cluster.serving import BASE_ID, Service

MESSAGES: Any = [{"role": "user", "content": "Go"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


class Found(BaseModel):
    """What the client's own `parse` asks for."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["a", "b"]
    sure: bool


@pytest.fixture(scope="module")
def service(worker_service: Service) -> Service:
    return worker_service


@pytest.mark.parametrize("model", [BASE_ID, "shout"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_json_schema(service: Service, model: str, stream: bool) -> None:
    made: Any = service.client().chat.completions.create(
        model=model,
        messages=MESSAGES,
        n=3,
        seed=1,
        stream=stream,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
    )
    texts = ["", "", ""]
    for reply in made if stream else [made]:
        for choice in reply.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_the_clients_own_models(service: Service) -> None:
    completion = service.client().chat.completions.parse(model="shout", messages=MESSAGES, response_format=Found)
    assert isinstance(completion.choices[0].message.parsed, Found)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_choice": ["red", "blue"]}, ("red", "blue")),
        ({"guided_regex": "ab?c"}, ("ac", "abc")),
        ({"structured_outputs": {"choice": ["x", "y"]}}, ("x", "y")),
        ({"guided_json": {"enum": [1, 2]}}, ("1", "2")),
        ({"guided_grammar": 'root ::= "a" | "b"'}, ("a", "b")),
    ],
    ids=str,
)
def test_fields_of_vllm(service: Service, fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    client = service.client()
    chat = client.chat.completions.create(model=BASE_ID, messages=MESSAGES, extra_body=fields)
    completion = client.completions.create(model="shout", prompt="Go", extra_body=fields)
    assert chat.choices[0].message.content in expected
    assert completion.choices[0].text in expected
    assert chat.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_a_schema_that_takes_too_long_is_refused_and_keeps_nobody_waiting(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_soon, may_end = Grammars.matcher, threading.Event()

    def matcher(self: Grammars, asked: StructuredOutputs) -> Matcher:
        if asked.regex == "slow":
            may_end.wait(30)
        return compile_soon(self, asked)

    monkeypatch.setattr(Grammars, "matcher", matcher)
    monkeypatch.setattr("lorafleet.cluster.serving.prompts.COMPILE_S", 3.0)
    body = {"model": BASE_ID, "prompt": "Go", "max_tokens": 4}
    with service.http() as http, ThreadPoolExecutor(8) as pool:
        slow = [
            pool.submit(http.post, "/v1/completions", json={**body, "structured_outputs": {"regex": "slow"}})
            for _ in range(8)
        ]
        for outputs in ({"regex": "ab?c"}, {"choice": ["x", "y"]}):
            assert http.post("/v1/completions", json={**body, "structured_outputs": outputs}).status_code == 200
        assert not any(each.done() for each in slow)
        for each in slow:
            error = each.result().json()["error"]
            assert (error["code"], error["param"]) == ("grammar_refused", "structured_outputs")
            assert error["message"] == "this regex takes over 3 s to compile"
    may_end.set()
