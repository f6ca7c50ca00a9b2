"""Every error type of pydantic has words of ours, or none of its own get through."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import core_schema

from lorafleet.cluster.anthropic.requests import CountBody, MessagesBody
from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.openai.embeddings import EmbeddingsBody
from lorafleet.cluster.openai.peer_schemas import DetokenizeBody, TokenizeBody
from lorafleet.cluster.openai.requests import ChatBody, CompletionBody, parse_body
from lorafleet.cluster.responses.requests import ResponsesBody
from lorafleet.cluster.validation import refusal_of


class Colour(Enum):
    RED = "red"


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Everything(BaseModel):
    model_config = ConfigDict(extra="forbid")

    flag: bool = False
    count: Annotated[int, Field(ge=1, le=9)] = 1
    share: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
    low: Annotated[int, Field(ge=3)] = 3
    high: Annotated[int, Field(le=3)] = 3
    text: Annotated[str, Field(min_length=1, max_length=4)] = "a"
    long: Annotated[str, Field(min_length=3)] = "abc"
    code: Annotated[str, Field(pattern="^[a-z]+$")] = "a"
    items: Annotated[list[int], Field(min_length=1, max_length=2)] = [1]
    pair: tuple[int, ...] = ()
    table: dict[str, int] = {}
    choice: Literal["a", "b"] = "a"
    colour: Colour = Colour.RED
    nothing: None = None
    inner: Cat | None = None
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] = Cat(kind="cat")
    odd: int = 1

    @field_validator("odd")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value

    @model_validator(mode="after")
    def _together(self) -> Everything:
        if self.count == 9 and self.flag:
            raise ValueError("count=9 needs no flag")
        return self


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"flag": "x"}, 'flag must be true or false; got "x"', "flag"),
        ({"flag": {}}, "flag must be true or false; got {}", "flag"),
        ({"count": 10}, "count must be between 1 and 9; got 10", "count"),
        ({"count": "x"}, 'count must be a whole number; got "x"', "count"),
        ({"count": 1.5}, "count must be a whole number; got 1.5", "count"),
        ({"count": []}, "count must be a whole number; got []", "count"),
        ({"share": 1}, "share must be over 0 and below 1; got 1", "share"),
        ({"share": "x"}, 'share must be a number; got "x"', "share"),
        ({"share": []}, "share must be a number; got []", "share"),
        ({"share": float("nan")}, "share must be finite; got NaN", "share"),
        ({"low": 2}, "low must be at least 3; got 2", "low"),
        ({"high": 4}, "high must be at most 3; got 4", "high"),
        ({"text": ""}, 'text must not be empty; got ""', "text"),
        ({"text": "abcde"}, 'text must have at most 4 characters; got "abcde"', "text"),
        ({"text": 5}, "text must be a text; got 5", "text"),
        ({"long": "a"}, 'long must have at least 3 characters; got "a"', "long"),
        ({"code": "A"}, 'code must match ^[a-z]+$; got "A"', "code"),
        ({"items": []}, "items must not be empty; got []", "items"),
        ({"items": [1, 2, 3]}, "items must have at most 2 entries; got [1, 2, 3]", "items"),
        ({"items": [1, "x"]}, 'items.1 must be a whole number; got "x"', "items.1"),
        ({"items": {}}, "items must be a list; got {}", "items"),
        ({"pair": 5}, "pair must be a list; got 5", "pair"),
        ({"table": 5}, "table must be an object; got 5", "table"),
        ({"choice": "c"}, "choice must be 'a' or 'b'; got \"c\"", "choice"),
        ({"colour": "blue"}, "colour must be 'red'; got \"blue\"", "colour"),
        ({"nothing": 1}, "nothing must be null; got 1", "nothing"),
        ({"inner": 1}, "inner must be an object; got 1", "inner"),
        ({"inner": {}}, "inner.kind is missing", "inner.kind"),
        ({"pet": {"kind": "cow"}}, "pet must have as 'kind' one of 'cat', 'dog'; got {\"kind\": \"cow\"}", "pet"),
        ({"pet": {}}, "pet must have a field 'kind'; got {}", "pet"),
        ({"odd": 2}, "odd must be odd; got 2", "odd"),
        ({"other": 2}, "other is not a known field", "other"),
        ({"count": 9, "flag": True}, "count=9 needs no flag", "count"),
        ({"text": "x" * 100}, 'text must have at most 4 characters; got "' + "x" * 76 + "...", "text"),
    ],
)
def test_words(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Everything.model_validate(fields)
    refusal = refusal_of(caught.value.errors(include_url=False), Everything.model_fields)
    assert (refusal.message, refusal.param) == (message, param)


def test_no_type_of_pydantic_speaks_for_itself() -> None:
    for kind in get_args(core_schema.ErrorType):
        error = {"type": kind, "loc": ("field",), "msg": "Input should be PYDANTIC", "input": 1, "ctx": _AnyContext()}
        refusal = refusal_of([error])
        assert "PYDANTIC" not in refusal.message
        assert refusal.param == "field"


class _AnyContext(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "x"


BODIES = (
    ChatBody,
    CompletionBody,
    CountBody,
    DetokenizeBody,
    EmbeddingsBody,
    MessagesBody,
    ResponsesBody,
    TokenizeBody,
)
MANY = [1.5] * 1000
"""Items that no list takes."""


def num_errors(kind: type[BaseModel], field: str, value: object) -> int:
    try:
        kind.model_validate({field: value})
    except ValidationError as error:
        return sum(each["loc"][:1] == (field,) for each in error.errors(include_url=False))
    return 0


@pytest.mark.parametrize("kind", BODIES)
def test_the_first_wrong_item_of_a_list_is_the_last(kind: type[BaseModel]) -> None:
    assert max(num_errors(kind, field, MANY) for field in kind.model_fields) in (1, 2)  # two kinds of prompts


@pytest.mark.parametrize(
    ("kind", "field", "item"),
    [
        (ChatBody, "messages", {"role": "user", "content": MANY}),
        (ChatBody, "messages", {"role": "assistant", "tool_calls": MANY}),
        (MessagesBody, "messages", {"role": "user", "content": MANY}),
        (MessagesBody, "messages", {"role": "user", "content": [{"type": "tool_result", "content": MANY}]}),
        (ResponsesBody, "input", {"type": "message", "role": "user", "content": MANY}),
        (ResponsesBody, "input", {"type": "function_call_output", "call_id": "1", "output": MANY}),
        (ResponsesBody, "input", {"type": "reasoning", "content": MANY}),
    ],
)
def test_lists_in_lists_too(kind: type[BaseModel], field: str, item: object) -> None:
    assert 1 <= num_errors(kind, field, [item]) <= 3  # the item may lack something, too


def test_too_many_biases_are_counted_and_not_checked() -> None:
    biases = dict.fromkeys(map(str, range(2000)), "no number")
    assert num_errors(CompletionBody, "logit_bias", biases) == 1
    with pytest.raises(BadRequest, match="logit_bias must have at most 1024 entries") as refused:
        parse_body(CompletionBody, json.dumps({"model": "m", "prompt": "x", "logit_bias": biases}).encode())
    assert len(str(refused.value)) < 200


def test_too_many_prompts_are_counted_and_not_read() -> None:
    with pytest.raises(BadRequest, match="prompt must be at most 2048 prompts"):
        parse_body(CompletionBody, json.dumps({"model": "m", "prompt": [[1]] * 3000}).encode())


@pytest.mark.parametrize(
    "value", [MANY, {"a": MANY}, "x" * 1000, ["é" * 1000]], ids=["list", "object", "text", "texts"]
)
def test_an_error_shows_the_beginning_of_a_large_value(value: object) -> None:
    shown = str(refusal_of([{"type": "bool_type", "loc": ("field",), "input": value}]))
    begun = shown.partition("got ")[2]
    assert begun.endswith("...")
    assert len(begun) == 80
    assert json.dumps(value, ensure_ascii=False).startswith(begun[:-3])
