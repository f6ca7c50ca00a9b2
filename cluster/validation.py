"""Turns what pydantic finds wrong into an error that names the field. Used by every route and by `user_config`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorafleet.cluster.errors import BadRequest

_LEADING_NAME = re.compile(r"(?:Value error, )?(\w+)=")


def with_integers(value: object) -> object:
    """A JSON value with 10.0 as 10, which JSON does not tell apart."""
    if isinstance(value, list) and {float, list} & set(map(type, value)):
        return [with_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def refusal_of(found: Sequence[Mapping[str, Any]]) -> BadRequest:
    """The first thing that pydantic found wrong (`ValidationError.errors()`), as an error that names the field."""
    error = found[0]
    param = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return BadRequest(f"{param} is no known field", param, "unknown_parameter")
    if error["type"] == "missing":
        return BadRequest(f"{param} is missing", param, "missing_parameter")
    if not param:
        name = _LEADING_NAME.match(message)
        return BadRequest(message, name[1] if name else None)
    *place, last = error["loc"]
    if "[" in str(last):
        # Each member of a union refuses a value by itself, with the member (`literal['all']`) at the end of the place.
        param = ".".join(str(part) for part in place)
        others = [other["msg"] for other in found[1:] if other["loc"][:-1] == error["loc"][:-1]]
        message = " or ".join([message, *(other.removeprefix("Input should be ") for other in others)])
    return BadRequest(f"{param}: {message}; it is {_shortened(error.get('input'))}", param)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
