"""Several ingresses and one controller: any ingress takes an admin call, and nothing depends on which one it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.cluster.live.service import LiveService, version_of
from tests.support.wait import eventually

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("tidy")]

NUM_STREAMS = 30
NUM_TOKENS = 96


@pytest.fixture(scope="module")
def three(live: LiveService) -> Iterator[LiveService]:
    """The service with three ingresses."""
    live.deploy(num_ingresses=3)
    eventually(lambda: live.states_of("ingress") == {"RUNNING": 3}, 150)
    yield live
    live.deploy()
    eventually(lambda: live.states_of("ingress") == {"RUNNING": 1}, 150)


def outcome(live: LiveService, model: str) -> tuple[str, bool]:
    """The text of a streamed answer, and whether it came to its `[DONE]`."""
    body: dict[str, Any] = {"prompt": "Hello", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    text, is_whole = "", False
    try:
        with live.http.stream("POST", "/v1/completions", json={"model": model, "stream": True, **body}) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    is_whole = True
                elif line.startswith("data: "):
                    for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                        text += choice["text"]
    except httpx.HTTPError:
        return text, False
    return text, is_whole


def test_after_a_replacement_no_ingress_serves_the_old_version(three: LiveService) -> None:
    old = three.put("shout", "one", warm="all").raise_for_status().json()["version"]
    expected = outcome(three, "shout")
    assert expected[1]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(outcome, three, "shout") for _ in range(NUM_STREAMS)]
        eventually(lambda: sum(worker["running"] for worker in three.workers()) >= NUM_STREAMS // 2)
        new = three.put("shout", "two").raise_for_status().json()["version"]
        after = {version_of(response) for response in three.complete_many("shout", 24, max_tokens=1)}
        assert [stream.result() for stream in streams] == [expected] * NUM_STREAMS
    assert after == {new} != {old}


def test_admin_calls_for_one_name_are_ordered_whichever_ingress_takes_them(three: LiveService) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: three.put("shout", ("one", "two")[i % 2]), range(8)))
    versions = {reply.raise_for_status().json()["version"] for reply in replies}
    assert len(versions) == 2
    named = three.adapter("shout")
    assert named["version"] in versions
    assert {version_of(response) for response in three.complete_many("shout", 12, max_tokens=1)} == {named["version"]}


def test_listings_are_the_same_at_every_ingress(three: LiveService) -> None:
    three.put("shout", "one").raise_for_status()
    (listing,) = {three.http.get("/v1/models").text for _ in range(12)}
    assert all(card["created"] > 1_700_000_000 for card in json.loads(listing)["data"])
    assert len({three.http.get("/v1/models/nobody").text for _ in range(12)}) == 1


def test_an_ingress_that_dies_takes_its_own_streams_only(three: LiveService) -> None:
    """Its begun streams end with one error event; what has no answer yet is asked of another ingress."""
    three.put("shout", "one", warm="all").raise_for_status()
    expected, _ = outcome(three, "shout")
    with ThreadPoolExecutor(NUM_STREAMS + 10) as pool:
        streams = [pool.submit(three.stream, "shout", max_tokens=NUM_TOKENS) for _ in range(NUM_STREAMS)]
        answers = [pool.submit(three.complete, "shout", max_tokens=NUM_TOKENS) for _ in range(10)]
        eventually(lambda: sum(worker["running"] for worker in three.workers()) >= NUM_STREAMS // 2)
        three.kill("ingress")
        ended = [stream.result() for stream in streams]
        assert {answer.result().raise_for_status().json()["choices"][0]["text"] for answer in answers} == {expected}
    texts = ["".join(choice["text"] for event in events for choice in event.get("choices", ())) for events in ended]
    codes = [event["error"]["code"] for events in ended for event in events if "error" in event]
    assert texts.count(expected) >= NUM_STREAMS // 3
    assert all(expected.startswith(text) for text in texts)
    assert codes == ["stream_broken"] * (NUM_STREAMS - texts.count(expected))
    eventually(lambda: three.states_of("ingress") == {"RUNNING": 3}, 150)
    eventually(lambda: all(worker["leases"] == 0 for worker in three.workers()), 30)


def test_without_a_controller_requests_are_served_and_admin_calls_wait(three: LiveService) -> None:
    old = three.put("shout", "one", warm="all").raise_for_status().json()["version"]
    new = three.adapter("shout")["version"]
    assert new == old
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(outcome, three, "shout") for _ in range(NUM_STREAMS)]
        eventually(lambda: sum(worker["running"] for worker in three.workers()) >= NUM_STREAMS // 2)
        changes = [pool.submit(three.put, "shout", "two") for _ in range(3)]
        three.kill("controller")
        refused = three.put("shout", "two")
        assert three.http.get("/readyz").status_code == 200
        assert {text for text, is_whole in (stream.result() for stream in streams) if is_whole}
        assert all(is_whole for _, is_whole in (stream.result() for stream in streams))
        statuses = {change.result().status_code for change in changes} | {refused.status_code}
    assert statuses <= {200, 503}
    if refused.status_code == 503:
        assert refused.json()["error"]["code"] == "controller_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: three.put("shout", "two").status_code == 200, 60)
    assert {version_of(response) for response in three.complete_many("shout", 12, max_tokens=1)} != {old}
