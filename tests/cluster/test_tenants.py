"""What one holder of an API key can learn of another through the prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from lorafleet.cluster.config import WorkerConfig
from lorafleet.cluster.http.auth import Keys
from lorafleet.workers.request import EngineRequest
from tests.cluster.serving import BASE_ID, Service, serving
from tests.support.bases import BaseKind
from tests.workers.harness import Shelf, greedy, open_worker, random_prompt, request_of

KEYS = Keys(api_keys=("mine", "yours"), admin_token="admin")


ROUTES: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 16},
}


def sent(service: Service, key: str, path: str = "/v1/completions") -> EngineRequest:
    """What a worker is asked for a completion under this key."""
    body = {"model": BASE_ID, **ROUTES[path]} | ({} if path == "/v1/responses" else {"max_tokens": 2})
    httpx.post(f"{service.url}{path}", json=body, headers={"authorization": f"Bearer {key}"}).raise_for_status()
    request: EngineRequest = service.workers.started[-1][1]
    return request


@pytest.mark.parametrize("path", ROUTES)
def test_each_key_has_a_salt_of_its_own(path: str) -> None:
    with serving(Service(keys=KEYS, salts_prefixes=True)) as service:
        mine, yours, again = (sent(service, key, path).cache_salt for key in ("mine", "yours", "mine"))
    assert mine == again != yours
    assert mine
    assert "mine" not in mine


def test_keys_share_a_cache_unless_it_is_said_otherwise() -> None:
    with serving(Service(keys=KEYS)) as service:
        assert {sent(service, key).cache_salt for key in ("mine", "yours")} == {""}


async def test_a_worker_reuses_what_the_same_salt_left(base_of: Callable[[BaseKind], Path]) -> None:
    prompt = random_prompt(40, 1)

    async def num_cached(salt: str) -> int:
        request = replace(request_of(prompt, None, greedy(2)), cache_salt=salt)
        async with aclosing(worker.generate(request)) as deltas:
            return [delta.num_cached_tokens async for delta in deltas][-1]

    async with open_worker(Shelf(base_of("llama"))) as worker:
        assert [await num_cached(salt) for salt in ("a", "b", "a", "b", "")] == [0, 0, 32, 32, 0]


@pytest.mark.parametrize(
    ("given", "means"),
    [("shared", "shared"), ("per_key", "per_key"), ("off", "off"), (True, "shared"), (False, "off")],
)
def test_a_setting_of_three_values_that_was_a_switch(given: object, means: str) -> None:
    assert WorkerConfig.model_validate({"prefix_cache": given}).prefix_cache == means
