"""Records the inputs and outputs of each module, so that two models can be compared module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3
"""Relative difference of a module's rows that float32's rounding does not explain."""


@dataclass(slots=True)
class _Call:
    kind: str
    given: Tensor | None
    gave: Tensor | None


@dataclass(slots=True)
class Trace:
    """Records the calls of a model's modules, by name and in the order in which they ended, while it is open."""

    model: nn.Module
    steps: list[dict[str, list[_Call]]] = field(default_factory=lambda: [{}])
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> Trace:
        for name, module in self.model.named_modules():
            if name:
                self._hooks.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin_step(self) -> None:
        """Calls from here on are of another step."""
        if self.steps[-1]:
            self.steps.append({})

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            first = output[0] if isinstance(output, tuple) and output else output
            gave = first if isinstance(first, Tensor) else None
            # What is in a tensor may be overwritten later.
            call = _Call(type(module).__name__, *(None if t is None else t.detach().clone() for t in (given, gave)))
            self.steps[-1].setdefault(name, []).append(call)

        return note


def first_difference(own: Trace, ours: Trace, rows: Sequence[tuple[range, int]]) -> str | None:
    """The first module that gives other rows than in `own` though it was given the same; None: there is none.

    `own` has one step, of one sequence. `rows`: of each step of `ours`, which of how many rows are the sequence's.
    """
    (whole,) = own.steps
    num_tokens = sum(len(span) for span, _ in rows)
    for name, calls in whole.items():
        pairs = []
        for part in ("given", "gave"):
            wanted = _rows([getattr(call, part) for call in calls], num_tokens)
            got = [
                None if found is None else found[span.start : span.stop]
                for step, (span, total) in zip(ours.steps, rows, strict=True)
                for found in [_rows([getattr(call, part) for call in step.get(name, [])], total)]
            ]
            parts = [each for each in got if each is not None]
            pairs.append((wanted, torch.cat(parts) if len(parts) == len(got) else None))
        (given, ours_given), (gave, ours_gave) = pairs
        if _differ(gave, ours_gave) and not _differ(given, ours_given):
            return f"{name} ({calls[0].kind})"
    return None


def _rows(tensors: Sequence[Tensor | None], num_rows: int) -> Tensor | None:
    """(num_rows, ...) of the calls of one step, if they are rows of it at all."""
    parts = []
    for tensor in tensors:
        if tensor is None or tensor.dim() < 1:
            return None
        parts.append(tensor[0] if tensor.dim() > 1 and tensor.shape[0] == 1 else tensor)
    if len(parts) > 1 and parts[0].shape[0] == num_rows:
        parts = parts[:1]  # called again for another pass over the head
    if not parts or sum(part.shape[0] for part in parts) != num_rows:
        return None
    return torch.cat(parts) if all(part.shape[1:] == parts[0].shape[1:] for part in parts) else None


def _differ(one: Tensor | None, other: Tensor | None) -> bool:
    """Return True if both are known and differ."""
    if one is None or other is None or one.shape != other.shape or not one.is_floating_point():
        return False
    scale = float(one.abs().amax()) + 1e-6
    return not float((one - other).abs().amax()) <= TOLERANCE * scale
