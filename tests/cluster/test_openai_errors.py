"""Whatever is wrong with a request: a status, a stable code, OpenAI's body, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafleet.cluster.errors import NoWorker, Overloaded, WorkerGone
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.incoming import MAX_BODY_BYTES
from lorafleet.cluster.openai.requests import ChatBody, CompletionBody
from lorafleet.workers.errors import AdapterUnavailable, NoRoomError
from tests.cluster.serving import BASE_ID, Service, serving
from tests.support.wait import eventually

PROMPT = {"model": BASE_ID, "prompt": "Hello"}
CHAT = {"model": BASE_ID, "messages": [{"role": "user", "content": "Hello"}]}


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "/work" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"model": f"{BASE_ID}:nobody"}, 404, "model_not_found", "model"),
        ({"model": "other:shout"}, 404, "model_not_found", "model"),
        ({"model": "../shout"}, 404, "model_not_found", "model"),
        ({"model": ""}, 400, "invalid_value", "model"),
        ({"model": None}, 400, "missing_parameter", "model"),
        ({"model": 3}, 400, "invalid_value", "model"),
        ({"prompt": None}, 400, "missing_parameter", "prompt"),
        ({"prompt": ""}, 400, "empty_prompt", "prompt"),
        ({"prompt": []}, 400, "empty_prompt", "prompt"),
        ({"prompt": ["Hello", ""]}, 400, "empty_prompt", "prompt"),
        ({"prompt": [[]]}, 400, "empty_prompt", "prompt"),
        ({"prompt": [1, "a"]}, 400, "invalid_value", "prompt"),
        ({"prompt": {"text": "a"}}, 400, "invalid_value", "prompt"),
        ({"prompt": [304]}, 400, "invalid_token_id", "prompt"),
        ({"prompt": [-1]}, 400, "invalid_token_id", "prompt"),
        ({"prompt": [10**30]}, 400, "invalid_token_id", "prompt"),
        ({"stop_token_ids": [304]}, 400, "invalid_token_id", "stop_token_ids"),
        ({"prompt": [5] * 512}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": "word " * 20_000}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 512}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": "5.5"}, 400, "invalid_value", "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, 400, "invalid_value", "min_tokens"),
        ({"temperature": 2.1}, 400, "invalid_value", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"temperature": 1e400}, 400, "invalid_json", None),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"top_k": -2}, 400, "invalid_value", "top_k"),
        ({"seed": 2**63}, 400, "invalid_value", "seed"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"n": 129}, 400, "invalid_value", "n"),
        ({"n": 1.5}, 400, "invalid_value", "n"),
        ({"prompt": [5, 6.5]}, 400, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 257}, 400, "invalid_value", "prompt"),
        ({"stop": ""}, 400, "invalid_value", "stop.0"),
        ({"stop": ["a"] * 17}, 400, "invalid_value", "stop"),
        ({"logprobs": 21}, 400, "invalid_value", "logprobs"),
        ({"logprobs": "all"}, 400, "invalid_value", "logprobs"),
        ({"stream": "maybe"}, 400, "invalid_value", "stream"),
        ({"stream_options": {"include_cost": True}}, 400, "unknown_parameter", "stream_options.include_cost"),
        ({"best_of": 2}, 400, "invalid_value", "best_of"),
        ({"best_of": "2"}, 400, "invalid_value", "best_of"),
        ({"suffix": "end"}, 400, "unsupported_parameter", "suffix"),
        ({"logit_bias": {"304": 1}}, 400, "invalid_token_id", "logit_bias"),
        ({"logit_bias": {"9" * 19: 1}}, 400, "invalid_token_id", "logit_bias"),
        ({"logit_bias": {"5": 100.1}}, 400, "invalid_value", "logit_bias.5"),
        ({"logit_bias": {"5": "much"}}, 400, "invalid_value", "logit_bias.5"),
        ({"logit_bias": {"fox": 1}}, 400, "invalid_value", "logit_bias.fox"),
        ({"logit_bias": {"-1": 1}}, 400, "invalid_value", "logit_bias.-1"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, 400, "invalid_value", "logit_bias"),
        ({"logit_bias": [5]}, 400, "invalid_value", "logit_bias"),
        ({"frequency_penalty": 2.1}, 400, "invalid_value", "frequency_penalty"),
        ({"presence_penalty": -2.1}, 400, "invalid_value", "presence_penalty"),
        ({"presence_penalty": "high"}, 400, "invalid_value", "presence_penalty"),
        ({"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
        ({"min_p": 1.1}, 400, "invalid_value", "min_p"),
        ({"temprature": 0.1}, 400, "unknown_parameter", "temprature"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_bad_completion(
    shared_service: Service, fields: Mapping[str, Any], status: int, code: str, param: str | None
) -> None:
    for stream in (False, True):
        body = json.dumps({"stream": stream} | PROMPT | dict(fields))
        with shared_service.http() as http:
            response = http.post("/v1/completions", content=body)
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (status, code, param)
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "Hello"}, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages.0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "invalid_value", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "invalid_value",
            "messages.0.content.0.type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "missing_parameter",
            "messages.0.tool_calls.0.function",
        ),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "context_length_exceeded", "messages"),
        ({"tools": [{"type": "function"}]}, "missing_parameter", "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format"),
        ({"guided_regex": "("}, "grammar_refused", "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "invalid_value", "guided_choice"),
        ({"chat_template": "{{ messages }}"}, "unsupported_parameter", "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "invalid_value", "chat_template_kwargs.tokenize"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_value", "continue_final_message"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": 3}, "invalid_value", "logprobs"),
        ({"echo": True}, "unknown_parameter", "echo"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_bad_chat(shared_service: Service, fields: Mapping[str, Any], code: str, param: str) -> None:
    with shared_service.http() as http:
        response = http.post("/v1/chat/completions", json=CHAT | dict(fields))
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)


def test_usage_chunk_without_a_stream(shared_service: Service) -> None:
    with shared_service.http() as http:
        response = http.post("/v1/completions", json=PROMPT | {"stream_options": {"include_usage": True}})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "stream_options")


def test_harmless_fields_are_accepted(shared_service: Service) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "best_of": 1.0,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "suffix": None,
        "temperature": None,
        "max_tokens": None,
    }
    with shared_service.http() as http:
        assert http.post("/v1/completions", json=PROMPT | harmless).status_code == 200
        chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True}
        assert http.post("/v1/chat/completions", json=CHAT | chat).status_code == 200


def test_a_number_without_a_fraction_is_an_integer(shared_service: Service) -> None:
    """As JSON has it, and its schemas."""
    with shared_service.http() as http:
        spelled = {"prompt": [[5.0, 6], [7]], "max_tokens": 3.0, "n": 2.0, "logit_bias": {"5": 1}, "seed": -4.0}
        reply = http.post("/v1/completions", json=PROMPT | spelled)
        assert reply.status_code == 200, reply.text
        usage = reply.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 12)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "\xc3"}',
        b'{"model": "\\ud800"}',
        b"[" * 1000,
        b'{"model": NaN}',
        b'{"model": "a"} x',
    ],
)
def test_no_json(shared_service: Service, raw: bytes) -> None:
    with shared_service.http() as http:
        for route in ("/v1/completions", "/v1/chat/completions"):
            response = http.post(route, content=raw)
            assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_huge_bodies(shared_service: Service) -> None:
    with shared_service.http() as http:
        declared = http.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
        assert (declared.status_code, error_of(declared)["code"]) == (413, "body_too_large")
        chunked = http.post("/v1/completions", content=(b" " * 2**20 for _ in range(17)))
        assert (chunked.status_code, error_of(chunked)["code"]) == (413, "body_too_large")
        assert http.post("/v1/completions", json=PROMPT).status_code == 200


def test_unknown_routes(shared_service: Service) -> None:
    with shared_service.http() as http:
        unknown = http.get("/v1/rerank")
        assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_url")
        wrong = http.get("/v1/completions")
        assert (wrong.status_code, error_of(wrong)["code"], wrong.headers["allow"]) == (
            405,
            "method_not_allowed",
            "POST",
        )


def test_probes() -> None:
    with serving(Service(keys=Keys(api_keys=("secret",)))) as service, service.http() as http:
        assert http.get("/healthz").status_code == 200
        assert http.get("/readyz").status_code == 200
        service.waits_for = "0 of 2 workers are up"
        response = http.get("/readyz")
        assert (response.status_code, response.json()["reason"]) == (503, "0 of 2 workers are up")
        assert http.get("/healthz").status_code == 200


def test_keys() -> None:
    with serving(Service(keys=Keys(api_keys=("other", "secret")))) as service:
        assert service.client().completions.create(**PROMPT).choices
        for authorization in (None, "Bearer wrong", "secret", "Basic secret", "Bearer", "Bearer sécret"):
            headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
            with service.http() as http:
                for response in (
                    http.get("/v1/models", headers=headers),
                    http.post("/v1/completions", json=PROMPT, headers=headers),
                ):
                    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
                    assert response.headers["www-authenticate"] == "Bearer"
        assert len(service.workers.started) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (Overloaded("256 requests wait", None, 1.0), 429, "overloaded", "1"),
        (NoWorker("none", None, 4.2), 503, "no_worker", "5"),
        (WorkerGone("died"), 503, "no_worker", "1"),
        (AdapterUnavailable("cold"), 503, "adapter_unavailable", "2"),
        (NoRoomError("ab" * 32, 5, 1, 3, 1, 5), 409, "no_room", None),
        (ZeroDivisionError("/srv/secret/path"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.slow
def test_errors_before_the_first_token_have_a_status(
    service: Service, error: Exception, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    service.workers.refuse = error
    with service.http() as http:
        response = http.post("/v1/completions", json=PROMPT | {"stream": stream, "n": 2})
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers.get("retry-after") == retry_after
    eventually(lambda: service.workers.num_open == 0)


def test_the_client_sees_its_own_errors(service: Service) -> None:
    service.workers.refuse = Overloaded("256 requests wait", None, 1.0)
    with pytest.raises(openai.RateLimitError) as caught:
        service.client().completions.create(model=BASE_ID, prompt="Hello")
    assert caught.value.code == "overloaded"


@pytest.mark.parametrize("n", [1, 3])
def test_an_error_after_the_first_token_is_one_last_event(service: Service, n: int) -> None:
    service.workers.fail = lambda worker_id, num_sent: WorkerGone("died") if num_sent == 2 else None
    with service.http() as http:
        text = http.post("/v1/completions", json=PROMPT | {"stream": True, "n": n}).text
    *chunks, last, end = text.split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stream_broken"
    assert len(chunks) >= 2
    assert all("choices" in json.loads(chunk.removeprefix("data: ")) for chunk in chunks)
    eventually(lambda: service.workers.num_open == 0)
    with pytest.raises(openai.APIError, match="lost in the middle"):
        for _ in service.client().completions.create(model=BASE_ID, prompt="Hello", stream=True):
            pass


def test_a_whole_answer_is_made_again_when_its_worker_is_lost(service: Service) -> None:
    want = service.client().completions.create(model=BASE_ID, prompt="Hello", n=3, seed=1)
    service.workers.fail = lambda worker_id, num_sent: (
        WorkerGone("died") if worker_id == "w0" and num_sent == 2 else None
    )
    got = service.client().completions.create(model=BASE_ID, prompt="Hello", n=3, seed=1)
    assert [choice.text for choice in got.choices] == [choice.text for choice in want.choices]
    assert got.usage == want.usage
    service.workers.fail = lambda worker_id, num_sent: WorkerGone("died") if num_sent == 2 else None
    with pytest.raises(openai.InternalServerError) as caught:
        service.client().completions.create(model=BASE_ID, prompt="Hello")
    assert (caught.value.status_code, caught.value.code) == (503, "no_worker")


FIELDS = st.sampled_from([*sorted({*CompletionBody.model_fields, *ChatBody.model_fields}), "tools", "best_of", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LIKELY = st.sampled_from(
    [BASE_ID, "shout", "Hello", 0, 1, 2, True, [5, 6], ["a", "b"], [[5], [6]], CHAT["messages"], {}]
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(FIELDS, LIKELY | JSON, max_size=5),
    base=st.sampled_from([("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)]),
)
@pytest.mark.slow
def test_any_body_is_answered(
    shared_http: httpx.Client, fields: dict[str, Any], base: tuple[str, dict[str, Any]]
) -> None:
    route, valid = base
    response = shared_http.post(route, json=valid | fields)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")))
@pytest.mark.slow
def test_any_bytes_are_answered(shared_http: httpx.Client, raw: bytes) -> None:
    response = shared_http.post("/v1/completions", content=raw)
    assert response.status_code == 400
    error_of(response)
