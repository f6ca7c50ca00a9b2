"""Rotation of queries and keys of latent attention, left to the launch that writes latents to pages.

Transformers' code calls a function that rotates both, in some ten launches. Where that is a known rotation, by number,
another function stands for it. It gives both back as they are, and keeps the angles for attention, which comes next.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafleet.workers.model.stand_ins import CANNOT, is_near

FUNCTIONS = ("apply_rotary_emb", "apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
"""Names under which transformers' attention calls it: with complex numbers, or with cos and sin."""
_ROWS = 4


class Angles(NamedTuple):
    """Angles of the rows of a pass."""

    cos: Tensor
    """(rows, pairs), any strides."""
    sin: Tensor
    is_interleaved: bool
    """A pair is two neighbours; otherwise element i and element pairs + i."""


class Deferred:
    """The angles of a module's last rotation, until attention takes them."""

    def __init__(self) -> None:
        self._angles: Angles | None = None

    def take(self) -> Angles | None:
        """Return the angles by which queries and keys are still to be rotated; None: they are rotated."""
        angles, self._angles = self._angles, None
        return angles

    def standing_for(self, own: Callable[..., Any], width: int) -> Callable[..., Any]:
        """Stand-in of a function that rotates heads of so many elements; the function itself, if it is not known."""
        kinds = {count: _kind(own, width, count) for count in (1, 2)}

        def rotate(query: Tensor, key: Tensor, *angles: Tensor, **named: Any) -> Any:
            kind = None if named else kinds.get(len(angles))
            if kind is None or query.shape[-1] != width or angles[0].is_complex() != (len(angles) == 1):
                return own(query, key, *angles, **named)
            self._angles = _angles(angles, width, is_interleaved=kind)
            return query, key

        return own if all(kind is None for kind in kinds.values()) else rotate


def defer(module: nn.Module, width: int) -> Deferred:
    """Have an attention module leave its rotation of `width` elements, as far as it is known."""
    deferred, forward = Deferred(), inspect.unwrap(type(module).forward)
    if not isinstance(forward, FunctionType) or "forward" in module.__dict__ or width % 2:
        return deferred
    called = {name: forward.__globals__[name] for name in FUNCTIONS if name in forward.__code__.co_names}
    others = {name: deferred.standing_for(own, width) for name, own in called.items()}
    if any(others[name] is not own for name, own in called.items()):
        # The same code, which finds other functions by those names: nothing changes for other models of the process.
        made = FunctionType(
            forward.__code__,
            {**forward.__globals__, **others},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        made.__kwdefaults__ = forward.__kwdefaults__
        module.__dict__["forward"] = MethodType(made, module)
    return deferred


def rotated(x: Tensor, angles: Angles) -> Tensor:
    """x: (..., rows, 2 * pairs) -> the same shape."""
    cos, sin = angles.cos.float(), angles.sin.float()
    wide = x.float()
    low, high = wide.reshape(*x.shape[:-1], -1, 2).unbind(-1) if angles.is_interleaved else wide.chunk(2, dim=-1)
    parts = low * cos - high * sin, high * cos + low * sin
    turned = torch.stack(parts, dim=-1).flatten(-2) if angles.is_interleaved else torch.cat(parts, dim=-1)
    return turned.to(x.dtype)


def _angles(given: tuple[Tensor, ...], width: int, *, is_interleaved: bool) -> Angles:
    """Of complex numbers (1, rows, pairs), or of cos and sin (1, rows, at least pairs)."""
    if len(given) == 1:
        cos, sin = torch.view_as_real(given[0][0]).unbind(-1)
    else:
        cos, sin = (each[0, :, : width // 2] for each in given)
    return Angles(cos, sin, is_interleaved)


def _kind(own: Callable[..., Any], width: int, num_angles: int) -> bool | None:
    """True if the function, given so many tensors of angles, rotates neighbours; None if it does something else.

    The order of what it returns does not matter, if it is the same for queries and for keys.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        query, key = torch.randn(1, 2, _ROWS, width), torch.randn(1, 1, _ROWS, width)
        phases, size = torch.randn(1, _ROWS, width // 2), 1.3
        cos, sin = (torch.cat((each, each), dim=-1) * size for each in (phases.cos(), phases.sin()))
        given = (torch.polar(torch.full_like(phases, size), phases),) if num_angles == 1 else (cos, sin)
        try:
            made = own(query, key, *given)
        except CANNOT:
            return None
        if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(each, Tensor) for each in made):
            return None
        plain = torch.arange(width)
        for is_interleaved in (False, True):
            wanted = [rotated(each, _angles(given, width, is_interleaved=is_interleaved)) for each in (query, key)]
            for order in (plain, torch.cat((plain[::2], plain[1::2]))):
                if all(is_near(own_one[..., :], one[..., order]) for own_one, one in zip(made, wanted, strict=True)):
                    return is_interleaved
    return None
