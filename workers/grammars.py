"""Grammars that answers keep to: compiled by llguidance, cached by content, and followed token by token.

The ingress checks what a client asks for, a worker follows it; both bound its size and cost. Any thread may compile.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Several
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafleet.workers.errors import GrammarRefused
from lorafleet.workers.request import StructuredOutputs

Masks = npt.NDArray[np.int32]
"""(rows, ceil(vocab / 32)): a bit a token, set where it may come; the lowest bit of a word is its first token."""

MAX_GRAMMAR_BYTES = 128 << 10
"""Longest grammar. It takes llguidance at most some 0.2 s to compile."""
MASK_THREADS = 8
"""Most threads that fill the masks of a step."""
MAX_CACHED = 128
"""Grammars that are kept compiled; those of the demo's size take some 100 KB each."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=50_000
)
"""What compiling a grammar and what one token may cost, in llguidance's units: about 20 ms each."""
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write white space: a model that may write any can write it for ever."""


class Matcher:
    """The state of one answer in its grammar. Belongs to the thread that asks it."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._has_ended = False
        self.end_token_ids: frozenset[int] = frozenset()
        """Tokens that may end the answer beside the base's own, where the grammar may end: those of the adapter."""

    def take(self, token_id: int) -> None:
        """The token that came."""
        if token_id in self.end_token_ids:
            self._has_ended = True
        else:
            self._matcher.consume_token(token_id)

    def allow_ends(self, mask: npt.NDArray[np.int32]) -> None:
        """Set the bits of `end_token_ids` in a mask (words,), if the grammar may end here."""
        if self.end_token_ids and self._matcher.is_accepting():
            words = mask.view(np.uint32)
            for token_id in self.end_token_ids:
                if token_id < 32 * len(words):
                    words[token_id // 32] |= np.uint32(1 << token_id % 32)

    @property
    def is_over(self) -> bool:
        """True if the answer is complete and nothing may follow."""
        return self._has_ended or bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Return why the grammar cannot be followed further; None if it can."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None


def fill_masks(matchers: Several[Matcher], masks: Masks) -> None:
    """Write which tokens may come next after each matcher's last one, several at once on llguidance's own threads.

    All tokens may, where the grammar is over or has become too costly (see `Matcher.error`).
    """
    going = [(each._matcher, row) for row, each in enumerate(matchers) if not (each.is_over or each.error)]
    masks.fill(-1)
    if len(going) == 1:
        ((only, row),) = going
        with contextlib.suppress(ValueError):  # it has become too costly, and says so itself
            only.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
    elif going:
        _executor().unsafe_compute_mask_ptr(going, masks.ctypes.data, masks.shape[1] * masks.itemsize, len(masks))
    for row, each in enumerate(matchers):
        if each.error is not None:
            masks[row] = -1
        elif not each.is_over:
            each.allow_ends(masks[row])


@cache
def _executor() -> LLExecutor:
    """Threads that this process keeps for masks."""
    return LLExecutor(min(MASK_THREADS, os.cpu_count() or 1))


class Grammars:
    """Compiles grammars for one tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, stop_token_ids: Collection[int] = ()
    ) -> None:
        """vocab_size: of the logits. stop_token_ids: that end an answer where its grammar may end."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = sorted(stop_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, asked: StructuredOutputs) -> Matcher:
        """The beginning of the grammar. Raises GrammarRefused, which says what is wrong with it or too costly."""
        source = _source_of(asked)
        with self._lock:
            found = self._compiled.get(source)
            if found is not None:
                self._compiled.move_to_end(source)
        if found is None:
            found = self._compile(source)
            with self._lock:
                self._compiled[source] = found
                while len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
        return Matcher(found.deep_copy())

    def _compile(self, source: str) -> LLMatcher:
        matcher = LLMatcher(self._llguidance_vocabulary(), source, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            fill_masks([Matcher(matcher)], np.zeros((1, -(-self._vocab_size // 32)), dtype=np.int32))
        if matcher.is_error():
            raise GrammarRefused(_first_line(matcher.get_error()))
        return matcher

    def _llguidance_vocabulary(self) -> LLTokenizer:
        """Made by the first grammar: it takes llguidance up to a second."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise GrammarRefused("the base has no tokenizer that tells how its tokens are spelled")
        with self._lock:
            if self._vocabulary is None:
                stops: list[int] | None = self._stop_token_ids or None
                self._vocabulary = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=stops)
            return self._vocabulary


def _source_of(asked: StructuredOutputs) -> str:
    """The grammar as llguidance reads it. Raises GrammarRefused."""
    kind, value = asked.kind_and_value()
    text = value if isinstance(value, str) else json.dumps({} if value is True else value)
    if value is False:
        raise GrammarRefused("no text fits the schema false")
    if len((text + (asked.calls or "")).encode(errors="replace")) > MAX_GRAMMAR_BYTES:
        raise GrammarRefused(f"it has {len(text)} characters; at most {MAX_GRAMMAR_BYTES} bytes are compiled")
    try:
        if kind == "json":
            source: str = LLMatcher.grammar_from_json_schema(_adapted_text(text), overrides=_options())
        else:
            source = grammar_from(kind, text)
    except (ValueError, RecursionError) as error:
        raise GrammarRefused(_first_line(str(error))) from None
    return source if asked.thought is None and asked.calls is None else _framed(source, asked.thought, asked.calls)


_SCHEMA = ("additionalProperties", "contains", "items")
_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED_SCHEMAS = ("$defs", "definitions", "patternProperties", "properties")
"""Keywords with one schema, with a list of them, and with an object of them."""
_MERGED = ("$dynamicRef", "$ref", "allOf", "anyOf", "oneOf")
"""Keywords whose schemas hold beside what else a schema says."""
_NOTES = {"$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "discriminator"}
_NOTES |= {"examples", "readOnly", "title", "writeOnly"}
"""Keywords that demand nothing."""
_SAY_WHAT_ELSE = ("additionalProperties", "minProperties", "patternProperties", "unevaluatedProperties")
"""Keywords of an object that lists its properties and may have others."""
_FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
"""Those that llguidance knows."""


def adapted(schema: Any) -> Any:
    """A JSON schema as a model can follow it: any document of it is one of the schema that was given.

    An object that lists its properties, and does not say whether others may come, has no others: a model that may add
    properties can add them for ever. It stays as it is where parts of the schema hold beside others, none of which
    lists all properties. Formats that llguidance does not know are left out, for they only note something.
    """
    parts = [schema]
    closes = True
    for part in parts:  # grows while it is read
        if isinstance(part, dict):
            is_merged = any(name in part for name in _MERGED) and len(part.keys() - _NOTES) > 1
            if is_merged or (isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1):
                closes = False
                break
            parts += [each for _, _, each in _parts_of(part)]
    return _adapted(schema, closes)


def _parts_of(schema: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The schemas in a schema: keyword, place under it, schema."""
    found: list[tuple[str, Any, Any]] = [(name, None, schema[name]) for name in _SCHEMA if name in schema]
    for name in _SCHEMAS:
        if isinstance(schema.get(name), list):
            found += [(name, i, each) for i, each in enumerate(schema[name])]
    for name in _NAMED_SCHEMAS:
        if isinstance(schema.get(name), dict):
            found += [(name, key, each) for key, each in schema[name].items()]
    return found


def _adapted(schema: Any, closes: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = {name: value.copy() if isinstance(value, dict | list) else value for name, value in schema.items()}
    for name, place, part in _parts_of(schema):
        if place is None:
            made[name] = _adapted(part, closes)
        else:
            made[name][place] = _adapted(part, closes)
    if isinstance(made.get("format"), str) and made["format"] not in _FORMATS:
        del made["format"]
    properties, required = made.get("properties"), made.get("required", [])
    is_listed = (
        isinstance(properties, dict)
        and isinstance(required, list)
        and all(isinstance(name, str) and name in properties for name in required)
    )
    if closes and is_listed and not any(name in made for name in _SAY_WHAT_ELSE):
        made["additionalProperties"] = False
    return made


def _adapted_text(text: str) -> str:
    """The adapted schema of a text; one that is no JSON as it is, for llguidance to say what is wrong."""
    try:
        return json.dumps(adapted(json.loads(text)))
    except ValueError:
        return text


_THOUGHTS: dict[str, tuple[str, ...]] = {
    "may_come": ('start: ("<think>" thought GAP)? last', 'thought[lazy]: THOUGHT "</think>"'),
    "begun": ("start: thought GAP last", 'thought[lazy]: THOUGHT "</think>"'),
    "analysis": (
        "start: analysis* last",
        'analysis: <|channel|> "analysis" <|message|> THOUGHT <|end|> <|start|> "assistant"',
    ),
}
"""What comes first, in Lark; `<|name|>` is a special token."""


def _framed(source: str, thought: str | None, calls: str | None) -> str:
    """The grammar of a thought, then of `source` or `calls`. A source is in Lark, or a list of grammars in JSON."""
    rest = json.loads(source)["grammars"] if source.startswith("{") else [{"lark_grammar": source}]
    rest[0]["name"] = "answer"
    lines = ["%llguidance {}", "start: last"]
    if thought is not None:
        first = _THOUGHTS[thought.removesuffix("_final")]
        lines = ["%llguidance {}", *first, "THOUGHT: /(.|\\n)*/", "GAP: /\\s{0,4}/"]
    last = '<|channel|> "final" <|message|> @answer' if thought == "analysis_final" else "@answer"
    if calls is not None:
        rest.append({"name": "calls", "lark_grammar": calls})
        last = f"@calls | {last}"
    return json.dumps({"grammars": [{"lark_grammar": "\n".join([*lines, f"last: {last}"])}, *rest]})


def _options() -> Any:
    return COMPACT


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else "it cannot be read"
