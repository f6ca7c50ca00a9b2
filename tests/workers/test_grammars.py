"""Answers that keep to a grammar, judged by jsonschema and `re`, beside answers that have none."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLParserLimits

from lorafleet.workers import grammars
from lorafleet.workers.errors import GrammarRefused
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model.sampler import Chosen, Sampler
from lorafleet.workers.request import SamplingParams, StructuredOutputs
from lorafleet.workers.step.sampling import DRAW, NO_SAMPLING
from tests.support.bases import VOCAB_SIZE, make_tokenizer
from tests.workers.harness import Answer, Shelf, ask, open_worker, random_prompt, request_of

Schema = dict[str, Any]


def constrained(outputs: dict[str, Any], **settings: Any) -> SamplingParams:
    return SamplingParams(
        structured_outputs=StructuredOutputs.model_validate(outputs), **{"max_tokens": 380, "seed": 3, **settings}
    )


def random_schema(rng: random.Random, depth: int = 0) -> Schema:
    """A schema whose documents are short, so that a base of random weights ends them."""
    makers: list[Callable[[], Schema]] = [
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(0, 5000)},
        lambda: {"type": "number", "minimum": 0, "maximum": rng.randint(1, 9)},
        lambda: {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 8)},
        lambda: {"type": "string", "pattern": rng.choice(["^[a-c]{1,4}$", "^(yes|no)$", "^[0-9]{3}-[0-9]{2}$"])},
        lambda: {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])},
        lambda: {"enum": rng.sample(["a", "b", 1, 2.5, None, True, "é", ["x"], {"k": 1}], 3)},
        lambda: {"const": rng.choice(["x", 7, None, [1, 2], {"a": {"b": 0}}])},
    ]
    if depth < 3:
        makers += [lambda: _random_object(rng, depth), lambda: _random_object(rng, depth), lambda: _union(rng, depth)]
        makers += [lambda: {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randint(0, 3)}]
    return rng.choice(makers)()


def deep(levels: int) -> Schema:
    schema: Schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"k": schema}, "required": ["k"]}
    return schema


def _random_object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["name", "age", "x y", "ключ", 'q"', "tags", "z"], rng.randint(0, 3))
    required = [name for name in names if rng.random() < 0.6]
    properties = {name: random_schema(rng, depth + 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _union(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
async def test_random_schemas(llama: Shelf, count: int) -> None:
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(count)]
    versions = [None, *llama.versions]
    async with open_worker(llama) as worker:
        answers = await asyncio.gather(
            *(
                ask(worker, random_prompt(5, i), versions[i % len(versions)], constrained({"json": schema}, seed=i))
                for i, schema in enumerate(schemas)
            )
        )
    ended = 0
    for schema, answer in zip(schemas, answers, strict=True):
        if answer.last.finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(answer.text), schema, jsonschema.Draft202012Validator)
    assert ended > 0.9 * count


async def test_an_adapters_own_end_token_ends_a_grammar(llama: Shelf) -> None:
    """Biased so that it comes as soon as it may, which is where the grammar may end."""
    end = 0  # the padding token, which no grammar lets come otherwise
    sampling = constrained({"regex": "[ab]{3,200}"}, max_tokens=50, logit_bias={end: 100.0})
    asked = request_of(random_prompt(7, 1), llama.versions[0], sampling)
    async with open_worker(llama) as worker:
        for ends, num_letters in (((end,), 3), ((), 50)):
            deltas = [delta async for delta in worker.generate(replace(asked, end_token_ids=ends))]
            text = "".join(delta.text for delta in deltas)
            assert re.fullmatch("[ab]+", text)
            assert len(text) == num_letters
            assert deltas[-1].finish_reason == ("stop" if ends else "length")


LISTED: Schema = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a"],
}


@pytest.mark.parametrize(
    ("schema", "more"),
    [
        (LISTED, False),
        ({"properties": {"x": {"$ref": "#/$defs/l"}}, "required": ["x"], "$defs": {"l": LISTED}}, False),
        ({"anyOf": [LISTED, {"type": "null"}], "title": "either"}, False),
        ({"type": "array", "items": LISTED, "minItems": 1}, False),
        (LISTED | {"additionalProperties": True}, True),
        (LISTED | {"required": ["c"]}, True),
        ({"allOf": [LISTED, {"properties": {"c": {"type": "integer"}}}]}, True),
        (LISTED | {"anyOf": [{"properties": {"c": {"type": "integer"}}}]}, True),
        ({"type": "object"}, True),
    ],
    ids=["listed", "reference", "choice", "items", "says so", "required", "all", "beside", "none listed"],
)
def test_objects_have_the_properties_that_are_listed(schema: Schema, more: bool) -> None:
    """As vLLM has it. Whatever is kept out would have been valid too, and whatever is let in is."""
    tokenizer = make_tokenizer()
    compiled = grammars.Grammars(tokenizer, vocab_size=VOCAB_SIZE)

    def is_whole(value: object) -> bool:
        matcher = compiled.matcher(StructuredOutputs(json_schema=schema))
        for token_id in tokenizer(json.dumps(value))["input_ids"]:
            matcher.take(token_id)
        return matcher.error is None and bool(matcher._matcher.is_accepting())

    inner = {"a": 1, "c": 2}
    value: object = {"x": inner} if "$defs" in schema else [inner] if schema.get("type") == "array" else inner
    jsonschema.validate(value, schema)
    assert is_whole(value) == more
    shown = json.loads(json.dumps(value).replace('"c"', '"b"'))
    if schema.get("required") != ["c"]:
        assert is_whole(shown)


def test_formats_that_nobody_knows_are_notes() -> None:
    compiled = grammars.Grammars(make_tokenizer(), vocab_size=VOCAB_SIZE)
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "binary"}}}
    assert compiled.matcher(StructuredOutputs(json_schema=schema)).error is None
    assert grammars.adapted(schema)["properties"] == {"format": {"type": "string"}}


@pytest.mark.parametrize("thought", ["may_come", "begun"])
@pytest.mark.parametrize(
    ("outputs", "good"),
    [
        ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, '{"a": 3}'),
        ({"json_object": True}, "{}"),
        ({"regex": "[ab]{3}-[0-9]"}, "aba-3"),
        ({"choice": ["red", "green"]}, "green"),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,5}/'}, "<abc>"),
        ({"grammar": 'root ::= ("yes" | "no") "!"'}, "no!"),
    ],
    ids=["json", "object", "regex", "choice", "lark", "gbnf"],
)
def test_a_grammar_begins_after_the_thought(outputs: dict[str, Any], good: str, thought: str) -> None:
    tokenizer = make_tokenizer()
    compiled = grammars.Grammars(tokenizer, vocab_size=VOCAB_SIZE)
    asked = StructuredOutputs.model_validate({**outputs, "thought": thought})

    def is_whole(text: str) -> bool:
        matcher = compiled.matcher(asked)
        for token_id in tokenizer(text)["input_ids"]:
            matcher.take(token_id)
        return matcher.error is None and bool(matcher._matcher.is_accepting())

    tag = "<think>" if thought == "may_come" else ""
    assert is_whole(f"{tag}Hm, {{ <b> or so?\n</think>\n\n{good}")
    assert is_whole(f"{tag}</think>{good}")
    assert is_whole(good) == (thought == "may_come")
    assert not is_whole(f"{tag}Hm.</think>\n~{good}")
    assert not is_whole(f"{tag}Hm.</think>")
    assert not is_whole(f"{tag}Hm. {good}")


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]{2,4}"}, "[ab]{3}-[0-9]{2,4}"),
        ({"choice": ["red", "green", "grün"]}, "red|green|grün"),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,5}/'}, "<[a-z]{1,5}>"),
        ({"grammar": 'root ::= ("yes" | "no") "!"'}, "(yes|no)!"),
        ({"json_object": True}, r"(?s)\{.*"),
    ],
    ids=["regex", "choice", "lark", "gbnf", "object"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_other_grammars(llama: Shelf, outputs: dict[str, Any], pattern: str, temperature: float) -> None:
    async with open_worker(llama) as worker:
        answer = await ask(worker, random_prompt(7, 1), None, constrained(outputs, temperature=temperature))
    assert re.fullmatch(pattern, answer.text), answer.text


async def test_every_setting_keeps_to_the_grammar(llama: Shelf) -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0},
        {"logit_bias": {260: 100.0}},
        {"top_k": 1},
        {"top_p": 0.1, "min_p": 0.5},
        {"ignore_eos": True},
        {"min_tokens": 30},
        {"logprobs": 3},
    ]
    schema = {"type": "array", "items": {"enum": ["ab", "cd", 3]}, "minItems": 2, "maxItems": 6}
    async with open_worker(llama) as worker:
        answers = await asyncio.gather(
            *(
                ask(worker, random_prompt(9, i), None, constrained({"json": schema}, **s))
                for i, s in enumerate(settings)
            )
        )
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), schema)
        assert answer.last.finish_reason == "stop"
    assert len(answers[-1].logprobs) == len(answers[-1].tokens)


async def test_a_stop_string_ends_it_before(llama: Shelf) -> None:
    async with open_worker(llama) as worker:
        answer = await ask(worker, random_prompt(7, 1), None, constrained({"regex": "ab,cd,ef"}, stop=(",ef",)))
    assert (answer.text, answer.last.stop_reason) == ("ab,cd", ",ef")


def test_masks_leave_other_rows_their_bits() -> None:
    logits = torch.randn(6, 304, generator=torch.Generator().manual_seed(1))
    draws = np.zeros(6, DRAW)
    draws["temperature"], draws["top_p"], draws["uniform"] = [0, 1, 0.7, 1, 1, 0], 1.0, [0.1, 0.2, 0.9, 0.5, 0.7, 0.3]
    free = replace(NO_SAMPLING, draws=draws, num_logprobs=3)
    masks = np.zeros((2, 10), np.int32)
    masks[:, 3] = -(2**31) + 5  # tokens 96, 98 and 127
    mixed = replace(free, masked=np.array([1, 4]), masks=masks)
    plain, found = Sampler().sample(logits, free), Sampler().sample(logits, mixed)
    others = [0, 2, 3, 5]
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs", "peaks"):
        assert torch.equal(getattr(plain, name)[others], getattr(found, name)[others])
    assert set(found.token_ids[[1, 4]].tolist()) <= {96, 98, 127}
    parts = Chosen.joined([Sampler().sample(logits[a:b], mixed.part(a, b)) for a, b in ((0, 2), (2, 6))])
    assert parts is not None
    assert torch.equal(parts.token_ids, found.token_ids)


async def test_free_rows_are_as_if_alone(llama: Shelf) -> None:
    versions = [None, *llama.versions]
    free = [SamplingParams(max_tokens=24, ignore_eos=True, seed=i, logprobs=2, temperature=i % 2) for i in range(6)]

    async def run(with_constrained: bool) -> list[Answer]:
        async with open_worker(llama) as worker:
            others = [
                asyncio.ensure_future(
                    ask(worker, random_prompt(6, 90 + i), versions[i % 2], constrained({"regex": "[a-f]{60}"}))
                )
                for i in range(5 if with_constrained else 0)
            ]
            answers = await asyncio.gather(
                *(ask(worker, random_prompt(8, i), versions[i % len(versions)], s) for i, s in enumerate(free))
            )
            await asyncio.gather(*others)
        return list(answers)

    alone, mixed = await run(False), await run(True)
    for one, other in zip(alone, mixed, strict=True):
        assert (one.tokens, one.text) == (other.tokens, other.text)


async def test_constrained_answers_keep_up_with_steps_in_flight(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a GPU's order of events they are the same, and no step is sat out."""
    versions = [None, *llama.versions]
    asked = [
        constrained({"regex": "[a-f]{40}"}, temperature=0.0),
        constrained({"regex": "[a-f]{12}"}, stop=("c",)),
        constrained({"choice": ["red", "green"]}),
        constrained({"json": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 9}}),
        SamplingParams(max_tokens=40, ignore_eos=True, seed=1),
    ]

    async def run() -> tuple[list[Answer], int]:
        async with open_worker(llama) as worker:
            answers = await asyncio.gather(
                *(ask(worker, random_prompt(9, i), versions[i % len(versions)], each) for i, each in enumerate(asked))
            )
            return list(answers), worker.stats.num_steps

    expected, num_steps = await run()
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
    answers, num_in_flight = await run()
    for answer, wanted in zip(answers, expected, strict=True):
        assert (answer.tokens, answer.text) == (wanted.tokens, wanted.text)
        assert answer.last.finish_reason == wanted.last.finish_reason
    assert num_in_flight <= num_steps + 3


@pytest.mark.parametrize(
    "outputs",
    [
        {"json": {"type": "nothing"}},
        {"json": {"$ref": "#/$defs/nowhere"}},
        {"json": "{"},
        {"json": False},
        {"regex": "("},
        {"json": deep(200)},
        {"grammar": "start: nowhere"},
        {"json": {"description": "x" * 200_000}},
    ],
    ids=lambda value: json.dumps(value)[:30],
)
@pytest.mark.slow
async def test_what_cannot_be_followed_is_refused(llama: Shelf, outputs: dict[str, Any]) -> None:
    async with open_worker(llama) as worker:
        free = asyncio.ensure_future(ask(worker, random_prompt(8, 1)))
        with pytest.raises(GrammarRefused):
            await ask(worker, random_prompt(7, 1), None, constrained(outputs))
        assert (await free).last.finish_reason == "length"


async def test_a_grammar_that_explodes_on_the_way_ends_its_own_answer_only(
    llama: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(max_lexer_states=60))
    sampling = constrained({"regex": "(.*a.{30}){5}"})
    async with open_worker(llama) as worker:
        free = asyncio.ensure_future(ask(worker, random_prompt(8, 1)))
        both = (ask(worker, random_prompt(7, i), None, sampling) for i in range(2))
        for found in await asyncio.gather(*both, return_exceptions=True):
            assert isinstance(found, GrammarRefused)
        assert (await free).last.finish_reason == "length"
