"""Copies of modules whose children are replaced by stand-ins, so that what a module does with them can be read.

A copy has the module's own code and plain attributes. Its tensors are on the host, wide, and small ones only: stand-ins
take the places of those with large weights. The module itself is left as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lorafleet.workers.model.paged_attention import IMPLEMENTATION, paged_attention

CANNOT = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError)
"""What modules raise that are called in a way they were not made for."""


@dataclass(slots=True, eq=False)
class Call:
    """A call of a stand-in."""

    name: str
    given: Tensor
    gave: Tensor
    arguments: Mapping[str, Any]
    """All others, by name."""


class StandIn(nn.Module):
    """Takes a module's place in a copy, and records its calls."""

    def __init__(self, module: nn.Module, name: str, calls: list[Call], gives: Tensor | None = None) -> None:
        """`gives`: what it returns; None: a function of its input that no other stand-in has."""
        super().__init__()
        self._names: list[str]
        self.__dict__["_names"] = list(inspect.signature(module.forward).parameters)
        self._name, self._calls, self._gives = name, calls, gives
        self._gain, self._shift = (1.0 + torch.rand(2, dtype=torch.float64)).tolist()
        self.is_tuple = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        given: Tensor = arguments.pop(self._names[0])
        gave = given * self._gain + self._shift if self._gives is None else self._gives
        self._calls.append(Call(self._name, given, gave, arguments))
        return (gave, None) if self.is_tuple else gave


def copied(module: nn.Module, children: Mapping[str, nn.Module], dtype: torch.dtype) -> Any:
    """A copy of the module with these children; other children are copied too."""
    made = copy.copy(module)
    made.__dict__.pop("forward", None)
    made._modules = {
        name: children[name] if name in children else None if child is None else copied(child, {}, dtype)
        for name, child in module._modules.items()
    }
    made._parameters = {name: on_host(value, dtype) for name, value in module._parameters.items()}
    made._buffers = {name: on_host(value, dtype) for name, value in module._buffers.items()}
    return made


def on_host(value: Any, dtype: torch.dtype) -> Any:
    """The value, with tensors in it copied to the host, and those of floats in `dtype`."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        return plain.to(dtype) if plain.is_floating_point() else plain
    if isinstance(value, tuple):
        return tuple(on_host(each, dtype) for each in value)
    return value


@dataclass(slots=True, eq=False)
class Attended:
    """A call of transformers' attention function."""

    query: Tensor
    key: Tensor
    value: Tensor
    gave: Tensor
    features: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def attention_recorded() -> Iterator[list[Attended]]:
    """Calls of substituted models' attention within are recorded, and answered with random numbers."""
    seen: list[Attended] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **features: Any
    ) -> tuple[Tensor, None]:
        gave = torch.randn(query.shape[0], query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
        seen.append(Attended(query, key, value, gave, features))
        return gave, None

    AttentionInterface.register(IMPLEMENTATION, attend)
    try:
        yield seen
    finally:
        AttentionInterface.register(IMPLEMENTATION, paged_attention)


def is_near(one: Tensor, other: Tensor, bound: float = 1e-5) -> bool:
    """Return True for tensors of one shape that differ by rounding at most."""
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= bound * other.abs().max().clamp(min=1.0))
