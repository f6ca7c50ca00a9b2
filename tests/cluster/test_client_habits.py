"""What clients send beside the documented fields: their own defaults, lax values, vLLM's and SGLang's fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from lorafleet.cluster.openai.peer_defaults import PEER_DEFAULTS
from tests.cluster.serving import BASE_ID, Service

PROMPT: dict[str, Any] = {"model": BASE_ID, "prompt": "Hello"}
CHAT: dict[str, Any] = {"model": BASE_ID, "messages": [{"role": "user", "content": "Hello"}]}
ROUTES: dict[str, dict[str, Any]] = {"/v1/completions": PROMPT, "/v1/chat/completions": CHAT}

DEFAULTS: Mapping[str, Any] = {
    # vLLM's, written out
    "add_special_tokens": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "best_of": 1,
    "cache_salt": None,
    "detokenize": True,
    "documents": None,
    "early_stopping": False,
    "ec_transfer_params": None,
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "include_reasoning": True,
    "include_stop_str_in_output": False,
    "kv_transfer_params": None,
    "length_penalty": 1.0,
    "logit_bias": None,
    "logits_processors": None,
    "logprob_token_ids": None,
    "media_io_kwargs": None,
    "min_p": 0.0,
    "min_tokens": 0,
    "mm_processor_kwargs": None,
    "n": 1,
    "presence_penalty": 0.0,
    "priority": 0,
    "prompt_logprobs": None,
    "repetition_detection": None,
    "repetition_penalty": 1.0,
    "request_id": "abc",
    "return_mm_kwargs": True,
    "return_prompt_text": None,
    "return_token_offsets": False,
    "return_tokens_as_token_ids": False,
    "routed_experts_prompt_start": 0,
    "seed": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop": [],
    "stop_token_ids": [],
    "stream": False,
    "stream_options": None,
    "stream_interval": 1,
    "temperature": 1.0,
    "thinking_token_budget": -1,
    "top_k": -1,
    "top_p": 1.0,
    "truncate_prompt_tokens": None,
    "use_beam_search": False,
    "user": None,
    "vllm_xargs": None,
    "watermarking": None,
    # SGLang's
    "bootstrap_host": None,
    "custom_labels": None,
    "custom_logit_processor": None,
    "custom_params": None,
    "ebnf": None,
    "extra_key": None,
    "json_schema": None,
    "lora_path": None,
    "no_stop_trim": False,
    "images_config": None,
    "input_ids": None,
    "max_dynamic_patch": None,
    "regex": None,
    "return_cached_tokens_details": False,
    "return_flat_raw_top_logprobs_b64": True,
    "return_hidden_states": False,
    "return_meta_info": False,
    "return_prompt_token_ids": False,
    "return_routed_experts": False,
    "rid": None,
    "routed_experts_start_len": 0,
    "session_id": None,
    "session_params": None,
    "separate_reasoning": True,
    "stop_regex": None,
    "stream_reasoning": True,
    "use_audio_in_video": False,
    "watermark": None,
    # of no protocol, and off
    "a_new_switch": False,
    "a_new_number": 0,
    "a_new_fraction": 0.0,
    "a_new_list": [],
    "a_new_text": "",
    "a_new_object": {},
    "a_new_field": None,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.slow
def test_defaults_of_other_servers_are_accepted(shared_service: Service, route: str) -> None:
    with shared_service.http() as http:
        for name, value in DEFAULTS.items():
            response = http.post(route, json=ROUTES[route] | {"max_tokens": 1, name: value})
            assert response.status_code == 200, (name, response.text)
        chat = {"top_logprobs": 0, "logprobs": False, "echo": False}
        completion = {"logprobs": None, "echo": False, "suffix": ""}
        own = chat if route.endswith("chat/completions") else completion
        assert http.post(route, json=ROUTES[route] | dict(DEFAULTS) | own).status_code == 200


@pytest.mark.slow
def test_every_neutral_value_is_accepted_and_others_are_not(shared_service: Service) -> None:
    with shared_service.http() as http:
        for name, values in PEER_DEFAULTS.items():
            for value in values:
                response = http.post("/v1/completions", json=PROMPT | {"max_tokens": 1, name: value})
                assert response.status_code == 200, (name, response.text)
            response = http.post("/v1/completions", json=PROMPT | {name: ["something", "else"]})
            assert error_of(response)["code"] == "unsupported_parameter", name
            assert error_of(response)["message"].startswith(f"{name} is not supported")


@pytest.mark.parametrize(
    "value", [0, 1, "0", "1", 0.0, 1.0, "true", "False", "on", "OFF", "y", "n", True, 2, "2", "", []]
)
def test_booleans_are_as_lax_as_vllms(shared_service: Service, value: object) -> None:
    """The judge is pydantic's lax mode, which vLLM's models have."""
    try:
        expected: bool | None = TypeAdapter(bool).validate_python(value)
    except ValidationError:
        expected = None
    with shared_service.http() as http:
        response = http.post("/v1/completions", json=PROMPT | {"max_tokens": 1, "return_token_ids": value})
    assert response.status_code == (400 if expected is None else 200)
    if expected is not None:
        assert ("token_ids" in response.json()["choices"][0]) is expected


@pytest.mark.parametrize("value", [1, 1.0, "1", " 2 ", "1.0", True, 1.5, "1.5", "one", "", [], "1e0"])
def test_numbers_are_as_lax_as_vllms(shared_service: Service, value: object) -> None:
    for kind, name in ((int, "max_tokens"), (float, "temperature")):
        try:
            expected: float | None = TypeAdapter(kind).validate_python(value)
        except ValidationError:
            expected = None
        with shared_service.http() as http:
            response = http.post("/v1/completions", json=PROMPT | {"ignore_eos": True, name: value})
        assert response.status_code == (400 if expected is None else 200), (name, response.text)
        if expected is not None and kind is int:
            assert response.json()["usage"]["completion_tokens"] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 5}, "temperature must be between 0 and 2; got 5"),
        ({"temperature": -0.5}, "temperature must be between 0 and 2; got -0.5"),
        ({"top_p": 0}, "top_p must be over 0 and at most 1; got 0"),
        ({"n": 129}, "n must be between 1 and 128; got 129"),
        ({"max_tokens": -1}, "max_tokens must be at least 0; got -1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be at least 1; got 0"),
        ({"max_tokens": "many"}, 'max_tokens must be a whole number; got "many"'),
        ({"stream": "maybe"}, 'stream must be true or false; got "maybe"'),
        ({"stop": [""]}, 'stop.0 must not be empty; got ""'),
        ({"stop": ["a"] * 17}, "stop must have at most 16 entries; got "),
        ({"model": 3}, "model must be a text; got 3"),
        ({"logit_bias": [5]}, "logit_bias must be an object; got [5]"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5 must be at most 100; got 101"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list; got 5"),
        ({"stream_options": {"x": 1}}, "stream_options.x is not a known field"),
        ({"min_tokens": 5, "max_completion_tokens": 4}, "min_tokens=5 is more than max_completion_tokens=4"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be -1, or at least 1; got 0"),
        ({"lora_path": "shout", "model": "whisper"}, "lora_path names 'shout' and model another adapter, 'whisper'"),
        ({"best_of": 5, "n": 2}, "best_of=5 must be 1 or n=2"),
        ({"lora_path": ["shout", "shout"]}, "lora_path=2 names for 1 prompts"),
        ({"separate_reasoning": False}, "separate_reasoning is not supported"),
        ({"thinking_token_budget": 100}, "thinking_token_budget is not supported"),
        ({"prompt_logprobs": 2, "stream": True}, "prompt_logprobs=2 cannot be streamed"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_refusals_name_field_and_limit(shared_service: Service, fields: Mapping[str, Any], message: str) -> None:
    with shared_service.http() as http:
        response = http.post("/v1/completions", json=PROMPT | dict(fields))
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(message)


def test_max_completion_tokens_goes_first(shared_service: Service) -> None:
    with shared_service.http() as http:
        for route, body in ROUTES.items():
            fields = {"max_tokens": 9, "max_completion_tokens": 3, "ignore_eos": True}
            assert http.post(route, json=body | fields).json()["usage"]["completion_tokens"] == 3


def test_continuous_usage(shared_service: Service) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with shared_service.http() as http:
        for route, body in ROUTES.items():
            text = http.post(route, json=body | {"stream": True, "stream_options": options, "n": 2}).text
            *chunks, last = (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))
            made: dict[int, int] = {}
            for chunk in chunks:
                usage, index = chunk["usage"], chunk["choices"][0]["index"]
                assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
                assert usage["completion_tokens"] > made.get(index, -1)
                made[index] = usage["completion_tokens"]
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == sum(made.values())


def test_best_of_that_asks_for_nothing(shared_service: Service) -> None:
    with shared_service.http() as http:
        for route, body in ROUTES.items():
            for best_of in (1, 3):
                reply = http.post(route, json=body | {"n": 3, "best_of": best_of, "max_tokens": 1})
                assert len(reply.json()["choices"]) == 3


def test_many_answers(shared_service: Service) -> None:
    reply = shared_service.client().completions.create(model=BASE_ID, prompt="Hello", n=128, max_tokens=2)
    assert [choice.index for choice in reply.choices] == list(range(128))


def test_lora_path_beside_the_base(service: Service) -> None:
    with service.http() as http:
        for model, path, version in (
            (BASE_ID, "shout", "aa" * 32),
            ("shout", "shout", "aa" * 32),
            (f"{BASE_ID}:shout", "shout", "aa" * 32),
            ("shout", "", "aa" * 32),
        ):
            for route, body in ROUTES.items():
                response = http.post(route, json=body | {"model": model, "lora_path": path})
                assert response.json()["lorafleet"]["version"] == version
        prompts = {"model": BASE_ID, "prompt": ["a", "b", "c"], "lora_path": ["shout", None, "whisper"]}
        choices = http.post("/v1/completions", json=prompts).json()["choices"]
        assert [each["lorafleet"]["version"] for each in choices] == ["aa" * 32, None, "bb" * 32]
        unknown = http.post("/v1/completions", json=PROMPT | {"lora_path": "nobody"})
        assert (unknown.status_code, error_of(unknown)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("limit", [1, 3, -1, 512])
def test_prompts_are_truncated_from_the_left(service: Service, limit: int) -> None:
    prompt = [5 + i % 200 for i in range(600)]
    with service.http() as http:
        body = {"model": BASE_ID, "prompt": prompt, "max_tokens": 4, "truncate_prompt_tokens": limit}
        response = http.post("/v1/completions", json=body)
    if limit == 512:
        assert error_of(response)["code"] == "context_length_exceeded"
        return
    _, request = service.workers.started[0]
    assert list(request.prompt_token_ids) == prompt[-(508 if limit == -1 else limit) :]


def test_prompt_logprobs_are_vllms(shared_service: Service) -> None:
    with shared_service.http() as http:
        for route, body in ROUTES.items():
            for logprobs in (False, True):
                asked = {"prompt_logprobs": 2, "return_token_ids": True, "max_tokens": 2}
                own = {"logprobs": 1 if route == "/v1/completions" else True} if logprobs else {}
                reply = http.post(route, json=body | asked | own).json()
                holder = reply["choices"][0] if route == "/v1/completions" else reply
                token_ids, found = holder["prompt_token_ids"], holder["prompt_logprobs"]
                assert len(found) == len(token_ids)
                assert found[0] is None
                for token_id, entries in zip(token_ids[1:], found[1:], strict=True):
                    assert str(token_id) in entries
                    assert len(entries) == 3
                    assert all(set(entry) == {"logprob", "rank", "decoded_token"} for entry in entries.values())
                shown = reply["choices"][0]["logprobs"]
                assert (shown is not None) is logprobs
                if logprobs:
                    assert len(shown.get("tokens", shown.get("content"))) == 2


def test_request_ids(shared_service: Service) -> None:
    with shared_service.http() as http:
        for route, body in ROUTES.items():
            named = http.post(route, json=body, headers={"x-request-id": "mine-1"})
            assert named.headers.get_list("x-request-id") == ["mine-1"]
            assert named.json()["id"].endswith("-mine-1")
            for field, value in (("request_id", "r7"), ("rid", "r7"), ("rid", ["r7"])):
                both = http.post(route, json=body | {field: value}, headers={"x-request-id": "proxys"})
                assert both.json()["id"].endswith("-r7")
            stream = http.post(route, json=body | {"stream": True}, headers={"x-request-id": "mine-2"})
            assert stream.headers["x-request-id"] == "mine-2"
            assert '-mine-2"' in stream.text
        wrong = http.post("/v1/completions", json={}, headers={"x-request-id": "mine-3"})
        assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, "mine-3")
        ids = {http.get("/v1/models").headers["x-request-id"] for _ in range(3)}
        assert len(ids) == 3
        assert http.get("/none", headers={"x-request-id": "a" * 200}).headers["x-request-id"] != "a" * 200


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error
