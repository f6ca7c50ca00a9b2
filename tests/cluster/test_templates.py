"""Events that are made of a template are, to the byte, those that are made anew."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.openai.replies import ChatReply, CompletionReply, Reply
from lorafleet.cluster.openai.requests import ChatBody, CompletionBody
from lorafleet.cluster.openai.templates import TEXT, TOKEN_ID, EventTemplate
from lorafleet.cluster.serving.dispatch import PreparedRequest
from lorafleet.workers.request import GenerateDelta, GenerateRequest
from tests.cluster.fakes import make_prompts

PROMPTS = make_prompts()
OPTIONS: dict[str, dict[str, Any]] = {
    "bare": {},
    "token ids": {"return_token_ids": True},
    "usage": {"stream_options": {"include_usage": True}},
    "every usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "several": {"n": 2, "return_token_ids": True},
}


def reply_of(kind: str, options: dict[str, Any]) -> Reply:
    common = {"model": 'a "model"', "stream": True, **options}
    n = options.get("n", 1)
    timer = RequestMetrics().begin("base")
    request = GenerateRequest(model="m", prompt=(1, 2), n=n)
    prepared = [PreparedRequest(request, (1, 2), None, PROMPTS.vocabulary, (), timer)]
    if kind == "chat":
        chat = ChatBody.model_validate({**common, "messages": [{"role": "user", "content": "x"}]})
        return ChatReply(chat, prepared, PROMPTS, "id")
    return CompletionReply(CompletionBody.model_validate({**common, "prompt": "x"}), prepared, "id")


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@given(texts=texts)
def test_events_are_the_same_to_the_byte(kind: str, options: dict[str, Any], texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", lambda: 1_700_000_000)
        fast, slow = reply_of(kind, options), reply_of(kind, options)
        patch.setattr(slow, "_is_plain", lambda answer, delta: False)
        for i, text in enumerate(texts):
            for index in range(options.get("n", 1)):
                is_last = i == len(texts) - 1
                ids = tuple(range(i, i + 1 + i % 3))
                delta = GenerateDelta(index, ids, text, None, "stop" if is_last else None, 2, 0, worker_id="w")
                assert fast.chunk(delta) == slow.chunk(delta)
        assert fast.end() == slow.end()


def test_a_template_keeps_what_stands_around_its_blanks() -> None:
    template = EventTemplate(json.dumps({"a": TOKEN_ID, "b": TEXT, "c": [TOKEN_ID], "d": 1}).encode())
    made = json.loads(template.event('q"\n\u2028é', (3, 4)))
    assert made == {"a": TOKEN_ID, "b": 'q"\n\u2028é', "c": [3, 4], "d": 1}
