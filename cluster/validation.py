"""Checks what comes from clients: bodies that stop at the first wrong item, and errors that name the field.

Used by every route and by `user_config`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import annotated_types
from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from lorafleet.cluster.errors import BadRequest

_LEADING_NAME = re.compile(r"(?:Value error, )?(\w+)=")

Context = Mapping[str, Any]


def _stop_early(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "tuple"):
            schema["fail_fast"] = True
        for part in schema.values():
            _stop_early(part)
    elif isinstance(schema, list):
        for part in schema:
            _stop_early(part)


class Incoming(BaseModel):
    """Base of bodies of clients and of the parts of them that have lists: a list's first wrong item is the last.

    pydantic would note each, and hold up every thread of the process for seconds where a client sends 100,000.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Build the schema of the class, with lists that stop early."""
        schema = handler(source)
        _stop_early(schema)
        return schema


def with_integers(value: object) -> object:
    """A JSON value with 10.0 as 10, which JSON does not tell apart."""
    if isinstance(value, list) and {float, list} & set(map(type, value)):
        return [with_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def refusal_of(found: Sequence[Mapping[str, Any]], fields: Mapping[str, FieldInfo] | None = None) -> BadRequest:
    """The first thing that pydantic found wrong (`ValidationError.errors()`), as an error that names the field.

    fields: those of the model, where they are known: both bounds of a number are then told.
    """
    error = found[0]
    place = list(error["loc"])
    param = ".".join(str(part) for part in place)
    if error["type"] == "extra_forbidden":
        return BadRequest(f"{param} is not a known field", param, "unknown_parameter")
    if error["type"] == "missing":
        return BadRequest(f"{param} is missing", param, "missing_parameter")
    if not param:
        message = error["msg"].removeprefix("Value error, ")
        name = _LEADING_NAME.match(message)
        return BadRequest(message if error["type"] == "value_error" else f"the body {_rule_of(error)}", _group(name))
    rule = _bounds_of(error, fields) or _rule_of(error)
    if "[" in str(place[-1]):
        # Each member of a union refuses a value by itself, with the member (`literal['all']`) at the end of the place.
        param = ".".join(str(part) for part in place[:-1])
        others = [_rule_of(other) for other in found[1:] if list(other["loc"][:-1]) == place[:-1]]
        rule = " or ".join([rule, *(other.removeprefix("must be ") for other in others)])
    return BadRequest(f"{param} {rule}; got {_shortened(error.get('input'))}", param)


def _rule_of(error: Mapping[str, Any]) -> str:
    """Say in plain words what the value must be."""
    rule = _RULES.get(error["type"])
    if rule is None:
        return "is not valid"
    return rule(error.get("ctx", {})) if callable(rule) else rule


def _bounds_of(error: Mapping[str, Any], fields: Mapping[str, FieldInfo] | None) -> str | None:
    """Both bounds of a number that is beyond one of them."""
    if fields is None or error["type"] not in _BOUNDS or len(error["loc"]) != 1 or error["loc"][0] not in fields:
        return None
    metadata = fields[error["loc"][0]].metadata
    low = [each for each in metadata if isinstance(each, annotated_types.Ge | annotated_types.Gt)]
    high = [each for each in metadata if isinstance(each, annotated_types.Le | annotated_types.Lt)]
    if len(low) != 1 or len(high) != 1:
        return None
    least = low[0].ge if isinstance(low[0], annotated_types.Ge) else low[0].gt
    most = high[0].le if isinstance(high[0], annotated_types.Le) else high[0].lt
    if isinstance(low[0], annotated_types.Ge) and isinstance(high[0], annotated_types.Le):
        return f"must be between {_number(least)} and {_number(most)}"
    over = "at least" if isinstance(low[0], annotated_types.Ge) else "over"
    under = "at most" if isinstance(high[0], annotated_types.Le) else "below"
    return f"must be {over} {_number(least)} and {under} {_number(most)}"


_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")

_SHOWN = 80
"""Characters of a wrong value that an error shows."""

_WHOLE = "must be a whole number"
_LIST = "must be a list"
_OBJECT = "must be an object"

_RULES: Mapping[str, str | Callable[[Context], str]] = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": _OBJECT,
    "enum": lambda context: f"must be {context['expected']}",
    "finite_number": "must be finite",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": lambda context: f"must be over {_number(context['gt'])}",
    "greater_than_equal": lambda context: f"must be at least {_number(context['ge'])}",
    "int_from_float": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": f"{_WHOLE} of fewer digits",
    "int_type": _WHOLE,
    "less_than": lambda context: f"must be below {_number(context['lt'])}",
    "less_than_equal": lambda context: f"must be at most {_number(context['le'])}",
    "list_type": _LIST,
    "literal_error": lambda context: f"must be {context['expected']}",
    "mapping_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "model_type": _OBJECT,
    "none_required": "must be null",
    "string_pattern_mismatch": lambda context: f"must match {context['pattern']}",
    "string_too_long": lambda context: f"must have at most {context['max_length']} characters",
    "string_too_short": lambda context: _at_least(context["min_length"], "characters"),
    "string_type": "must be a text",
    "string_unicode": "must be valid Unicode",
    "too_long": lambda context: f"must have at most {context['max_length']} entries",
    "too_short": lambda context: _at_least(context["min_length"], "entries"),
    "tuple_type": _LIST,
    "union_tag_invalid": lambda context: f"must have as {context['discriminator']} one of {context['expected_tags']}",
    "union_tag_not_found": lambda context: f"must have a field {context['discriminator']}",
    "value_error": lambda context: str(context["error"]),
}
"""What each error type of pydantic says, in words that a client of any language understands."""


def _at_least(count: int, of: str) -> str:
    return "must not be empty" if count == 1 else f"must have at least {count} {of}"


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _group(match: re.Match[str] | None) -> str | None:
    return None if match is None else match[1]


def _shortened(value: object) -> str:
    """The beginning of a value as JSON. No more of a large one is written than is shown."""
    text = ""
    value = value[:_SHOWN] if isinstance(value, str) else value
    try:
        for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            text += piece
            if len(text) > _SHOWN:
                break
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
