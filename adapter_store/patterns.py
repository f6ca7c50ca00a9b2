"""Regular expressions that come with an adapter, matched against module names within a time limit.

A hostile pattern can keep Python's matcher, and so the interpreter, busy without end. So a pattern that is more than a
plain name is matched in a child process, which can be ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from lorafleet.adapter_store.errors import AdapterRefused

TIME_LIMIT_S = 5.0
"""For all patterns of one adapter together."""

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

_NAME = r"(?:[A-Za-z0-9_.^$-]|\\[.d])*"
_PLAIN = re.compile(rf"{_NAME}|\(\.\*\\\.\)\?\({_NAME}\)\$")
"""Patterns without choices to go back to: names, and names behind PEFT's own `(.*\\.)?`."""

_MAX_PLAIN = 1024

_CHILD = """
import json, re, resource, sys
try:
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
except (OSError, ValueError):
    pass  # not every system bounds a process's memory
request = json.load(sys.stdin)
answer = []
for method, pattern in request["patterns"]:
    try:
        match = getattr(re.compile(pattern), method)
        hits = [match(name) for name in request["names"]]
        answer.append([hit and (hit.groupdict().get("idx") or "") for hit in hits])
    except (re.error, RecursionError, OverflowError, MemoryError):
        answer.append(None)
json.dump(answer, sys.stdout)
"""


@contextmanager
def one_time_limit() -> Iterator[None]:
    """All `match_patterns` calls inside share one `TIME_LIMIT_S`."""
    token = _deadline.set(time.monotonic() + TIME_LIMIT_S)
    try:
        yield
    finally:
        _deadline.reset(token)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression and how it is applied."""

    method: Literal["match", "fullmatch"]
    regex: str
    field: str
    """The config field that it came with, for the error."""


def match_patterns(patterns: Sequence[Pattern], names: Sequence[str]) -> list[list[str | None]]:
    """For each pattern and each name: None, or the text of the group `idx` ("" without one).

    Raises AdapterRefused `invalid_pattern` or `pattern_too_slow`, naming the field.
    """
    if not patterns:
        return []
    if len(patterns) <= _MAX_PLAIN and all(_PLAIN.fullmatch(pattern.regex) for pattern in patterns):
        return [_match_here(pattern, names) for pattern in patterns]
    request = json.dumps({"patterns": [[p.method, p.regex] for p in patterns], "names": list(names)})
    fields = ", ".join(sorted({pattern.field for pattern in patterns}))
    deadline = _deadline.get()
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=request,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S if deadline is None else max(0.0, deadline - time.monotonic()),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        message = f"matching the patterns of {fields} takes more than the {TIME_LIMIT_S:g} s that an adapter has"
        raise AdapterRefused("pattern_too_slow", message, fields) from error
    if child.returncode != 0:
        raise AdapterRefused("invalid_pattern", f"the patterns of {fields} cannot be matched", fields)
    answer: list[list[str | None] | None] = json.loads(child.stdout)
    return [_checked(hits, pattern) for hits, pattern in zip(answer, patterns, strict=True)]


def _match_here(pattern: Pattern, names: Sequence[str]) -> list[str | None]:
    try:
        match = getattr(re.compile(pattern.regex), pattern.method)
    except re.error:
        return _checked(None, pattern)
    return ["" if match(name) else None for name in names]


def _checked(hits: list[str | None] | None, pattern: Pattern) -> list[str | None]:
    if hits is None:
        message = f"{pattern.field}: {pattern.regex[:200]!r} is not a regular expression"
        raise AdapterRefused("invalid_pattern", message, pattern.field)
    return hits
