"""Adapters with a chat template and end tokens of their own: used for their requests, and for no others'."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from lorafleet.adapter_store.manifest import AdapterChat
from lorafleet.cluster.serving.time_limit import within
from tests.cluster.serving import BASE_ID, Service, serving

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("model", ["shout", f"{BASE_ID}:shout", "whisper", BASE_ID])
def test_an_adapters_template_writes_its_conversations(model: str) -> None:
    service = Service()
    service.store.chats = {"shout": AdapterChat(TEMPLATE, ())}
    tokenizer: Any = service.prompts.tokenizer
    own = TEMPLATE if "shout" in model else None
    wanted = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, chat_template=own)
    with serving(service), service.http() as http:
        service.client().chat.completions.create(model=model, messages=MESSAGES, max_tokens=1)
        tokenized = http.post("/tokenize", json={"model": model, "messages": MESSAGES}).json()["tokens"]
        counted = http.post("/v1/messages/count_tokens", json={"model": model, "messages": MESSAGES}).json()
    prompt = service.workers.started[-1][1].prompt_token_ids
    assert tokenizer.decode(list(prompt)) == wanted
    assert (tuple(tokenized), counted["input_tokens"]) == (prompt, len(prompt))


def test_a_template_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.cluster.serving.prompts.TEMPLATE_S", 0.3)
    service = Service()
    service.store.chats = {
        "shout": AdapterChat(ENDLESS, ()),
        "whisper": AdapterChat("{{ raise_exception('no, thanks') }}", ()),
    }
    body = {"messages": MESSAGES, "max_tokens": 1}
    with serving(service), service.http() as http:
        for model, words in (("shout", "took over 0.3 s"), ("whisper", "no, thanks")):
            reply = http.post("/v1/chat/completions", json={**body, "model": model})
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "chat_template_failed")
            assert words in reply.json()["error"]["message"]
        assert http.post("/v1/chat/completions", json={**body, "model": BASE_ID}).status_code == 200


async def test_what_takes_too_long_stops() -> None:
    num_turns = 0

    def turn() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1

    with pytest.raises(TimeoutError):
        await within(0.1, turn)
    await asyncio.sleep(0.1)
    before = num_turns
    await asyncio.sleep(0.1)
    assert num_turns == before > 0
    assert await within(1.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await within(1.0, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        await within(0.01, lambda: time.sleep(0.05))


def test_an_adapters_end_tokens_end_its_answers(worker_service: Service) -> None:
    def asked(**more: Any) -> Any:
        fields = {"model": "shout", "prompt": "Hello", "max_tokens": 24, "temperature": 0}
        reply = worker_service.client().completions.create(**fields, extra_body={"return_token_ids": True, **more})
        return reply.choices[0]

    plain = asked()
    end = plain.token_ids[6]
    place = plain.token_ids.index(end)
    worker_service.store.chats = {"shout": AdapterChat(None, (end, 10**6))}
    try:
        ended = asked()
        assert (ended.finish_reason, ended.stop_reason, ended.token_ids) == ("stop", None, plain.token_ids[: place + 1])
        assert plain.text.startswith(ended.text)
        assert asked(ignore_eos=True).token_ids == plain.token_ids
        assert end not in asked(min_tokens=24).token_ids[:23]
    finally:
        worker_service.store.chats = {}
