"""Conversations as clients keep them, held against transformers' own rendering of what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.serving import BASE_ID, Service, serving

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content }}"
    "{% if m.reasoning_content %}(thought {{ m.reasoning_content }}){% endif %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking is defined %}(thinking {{ enable_thinking }}){% endif %}{{ reasoning_effort }}"
)
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
KNOWN_CALL = {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    assert service.prompts.tokenizer is not None
    service.prompts.tokenizer.chat_template = TEMPLATE
    with serving(service) as running:
        yield running


def rendered(service: Service, messages: list[dict[str, Any]], **fields: Any) -> str:
    """The prompt that the service makes of a chat."""
    service.client().chat.completions.create(model=BASE_ID, messages=messages, max_tokens=1, extra_body=fields)
    _, request = service.workers.started[-1]
    assert service.prompts.tokenizer is not None
    return str(service.prompts.tokenizer.decode(list(request.prompt_token_ids)))


def expected(service: Service, messages: list[dict[str, Any]], **options: Any) -> str:
    options = {"add_generation_prompt": True, **options}
    assert service.prompts.tokenizer is not None
    return str(service.prompts.tokenizer.apply_chat_template(messages, tokenize=False, **options))


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}], ids=str)
def test_a_call_and_its_answer(service: Service, content: dict[str, Any]) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "tool_calls": [CALL], **content},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]
    known: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [KNOWN_CALL]},
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "rain"},
    ]
    assert rendered(service, messages) == expected(service, known)


def test_what_clients_keep_in_messages_is_passed_over(service: Service) -> None:
    messages: list[dict[str, Any]] = [
        {**USER, "id": 3, "opts": {"visible": False}},
        {"role": "assistant", "content": "Ho", "refusal": None, "annotations": [], "audio": {"id": "a"}},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}],
        },
    ]
    known: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "a\nb"}]
    assert rendered(service, messages) == expected(service, known)


def test_a_call_that_was_no_json_goes_back_as_it_was(service: Service) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": '{"city": Oslo'}}
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER]
    assert rendered(service, messages) == expected(service, messages)


def test_reasoning_goes_back_to_the_template(service: Service) -> None:
    known: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "Ho", "reasoning_content": "hm"}, USER]
    assert rendered(service, known) == expected(service, known)
    renamed = [{"reasoning" if name == "reasoning_content" else name: v for name, v in m.items()} for m in known]
    assert rendered(service, renamed) == expected(service, known)


def test_options_of_the_template(service: Service) -> None:
    thinking = rendered(service, [USER], chat_template_kwargs={"enable_thinking": False})
    assert thinking == expected(service, [USER], enable_thinking=False)
    assert rendered(service, [USER], reasoning_effort="low") == expected(service, [USER], reasoning_effort="low")
    without = expected(service, [USER], reasoning_effort="none", enable_thinking=False)
    assert rendered(service, [USER], reasoning_effort="none") == without


def test_the_last_message_goes_on(service: Service) -> None:
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "THE CAT"}]
    text = rendered(service, messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("THE CAT")
    assert text == expected(service, messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered(service, messages, add_generation_prompt=False).endswith("THE CAT</>")
