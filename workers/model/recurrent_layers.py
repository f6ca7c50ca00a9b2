"""Recurrent layers of transformers, with each sequence's state in a slot: convolutions, delta rules, state spaces.

A layer's code stays transformers' own, and its projections see all rows of a step. Only the functions that look at
earlier rows are replaced: they compute each sequence's rows from its slot and leave there what the next step needs.
Sequences of one row, which come first, are one batch. A longer piece is computed by the layer's own function.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.state_store import StateShape, StateStore
from lorafleet.workers.step.batch import StepInputs

MOST_ROWS = 1024
"""Of a piece that one call computes: what it makes of each row is much larger than the row."""
NUM_TOKENS = 2
"""Of the pass that reads the shapes of states."""

Compute = Callable[[tuple[Tensor, ...], Tensor | None], tuple[Tensor, Tensor]]
"""(rows, each (sequences, length, ...); state before them, (sequences, ...), which may be overwritten; None for zeros)
-> (what they give, (sequences, length, ...); state after them)."""
Functions = Mapping[str, Callable[..., Any]]
"""Functions of transformers, by name."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Rows of a running pass by sequence, and the slots of these."""

    num_decodes: int
    """Sequences of one row, which come first."""
    slots: Tensor
    """(num_decodes,) int64."""
    is_first: Tensor
    """(num_decodes,) bool: nothing came before the row."""
    longer: tuple[tuple[int, int, int, bool], ...]
    """Of each other sequence: first row, row after the last, slot, and whether nothing came before."""

    @classmethod
    def of(cls, inputs: StepInputs) -> _Pieces:
        batch = inputs.attention
        num, end, longer = batch.num_decodes, batch.num_decodes, []
        for length, context, slot in zip(
            batch.query_lengths[num:], batch.host_context_lengths[num:], inputs.host_state_slots[num:], strict=True
        ):
            if length:
                longer.append((end, end + length, slot, context == length))
            end += length
        return cls(num, inputs.state_slots[:num].long(), batch.context_lengths[:num] <= 1, tuple(longer))


@dataclass(slots=True)
class RecurrentContext:
    """The states, and the pieces of the running forward pass. Without a store it notes the states' shapes."""

    store: StateStore | None = None
    pieces: _Pieces | None = None
    shapes: dict[str, StateShape] = field(default_factory=dict)

    def begin(self, inputs: StepInputs) -> None:
        """A forward pass of these inputs follows."""
        if self.store is not None and self.store.has_states:
            self.pieces = _Pieces.of(inputs)

    def run(self, name: str, rows: tuple[Tensor, ...], compute: Compute) -> Tensor:
        """Return what operation `name` gives, (1, num_rows, ...). rows: each (1, num_rows, ...)."""
        if self.store is None:
            out, after = compute(rows, None)
            if name in self.shapes:
                raise UnsupportedModel(f"{name} is called more than once for each token, which is not supported")
            self.shapes[name] = StateShape(tuple(after.shape[1:]), after.dtype)
            return out
        assert self.pieces is not None, "a forward pass outside the runner"
        states, pieces, parts = self.store.tensors[name], self.pieces, []
        if pieces.num_decodes:
            before = states.index_select(0, pieces.slots)
            # Not by a product: what another sequence left there need not be finite.
            before.masked_fill_(pieces.is_first.view(-1, *(1,) * (before.dim() - 1)), 0)
            given = tuple(each[:, : pieces.num_decodes].transpose(0, 1) for each in rows)
            out, after = compute(given, before)
            states.index_copy_(0, pieces.slots, after.to(states.dtype))
            parts.append(out.transpose(0, 1))
        for first, end, slot, is_first in pieces.longer:
            state = None if is_first else states[slot : slot + 1]
            for start in range(first, end, MOST_ROWS):
                out, state = compute(tuple(each[:, start : min(end, start + MOST_ROWS)] for each in rows), state)
                parts.append(out)
            assert state is not None
            states[slot : slot + 1] = state
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True)
class _Operation:
    """A function of a layer that looks at earlier rows, in the place of the layer's own."""

    name: str
    own: Functions
    """The layer's own functions, by name."""
    context: RecurrentContext


class _Convolution(_Operation):
    """A causal convolution over time of each channel by itself. Keeps the last inputs, one fewer than its taps."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: object
    ) -> Tensor:
        """x: (1, channels, num_rows); weight: (channels, taps). Returns the shape of `x`."""
        convolve, num_kept = self.own["causal_conv1d_fn"], weight.shape[1] - 1

        def compute(rows: tuple[Tensor, ...], before: Tensor | None) -> tuple[Tensor, Tensor]:
            given = rows[0].transpose(1, 2)
            if before is None:
                before = given.new_zeros(*given.shape[:2], num_kept)
            joined = torch.cat([before, given], dim=2)
            out: Tensor = convolve(joined, weight, bias, activation=activation)
            return out[..., num_kept:].transpose(1, 2), joined[..., joined.shape[2] - num_kept :]

        return self.context.run(self.name, (x.transpose(1, 2),), compute).transpose(1, 2)


class _DeltaRule(_Operation):
    """The gated delta rule of linear attention, or Kimi's, which forgets each element of a key at a pace of its own.

    Keeps (heads, width of keys, width of values) in float32.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """query, key, value: (1, num_rows, heads, width); g, beta: (1, num_rows, heads), or g of the keys' width."""
        called = self.name.rpartition(".")[2]
        chunks, by_row = self.own[called], self.own[called.replace("chunk", "recurrent")]
        kwargs |= {"output_final_state": True}

        def compute(rows: tuple[Tensor, ...], before: Tensor | None) -> tuple[Tensor, Tensor]:
            query, key, value, g, beta = rows
            rule = by_row if query.shape[1] == 1 else chunks
            given: tuple[Tensor, Tensor] = rule(query, key, value, g=g, beta=beta, **kwargs | {"initial_state": before})
            return given

        return self.context.run(self.name, (query, key, value, g, beta), compute), None


class _StateSpace(_Operation):
    """Mamba 2's scan. Keeps (heads, width, state) in float32."""

    def __call__(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int, **kwargs: Any
    ) -> Tensor:
        """x: (1, num_rows, heads, width); dt: (1, num_rows, heads); a: (heads,); b, c: (1, num_rows, groups, state)."""
        scan = self.own["mamba2_chunk_scan"]
        kwargs |= {"return_final_states": True}

        def compute(rows: tuple[Tensor, ...], before: Tensor | None) -> tuple[Tensor, Tensor]:
            x, dt, b, c = rows
            if x.shape[1] == 1 and before is not None:
                return _one_row(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], before, **kwargs)
            size = min(chunk_size, max(16, 1 << (x.shape[1] - 1).bit_length()))  # no padding to a chunk of 256
            given: tuple[Tensor, Tensor] = scan(x, dt, a, b, c, size, **kwargs | {"initial_states": before})
            return given

        return self.context.run(self.name, (x, dt, b, c), compute)


def _one_row(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor,
    *,
    D: Tensor | None = None,  # noqa: N803  (transformers' names)
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Mamba 2's recurrence of one row of each sequence, with less memory than the scan over chunks.

    x: (sequences, heads, width); dt: (sequences, heads); b, c: (sequences, groups, state); before: (sequences, heads,
    width, state), which is overwritten. Returns (sequences, 1, heads, width) float32, and the state after.
    """
    heads_of_group = x.shape[1] // b.shape[1]
    x, b, c = x.float(), *(each.float().repeat_interleave(heads_of_group, dim=1) for each in (b, c))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit).float()
    decay = torch.exp(a.float() * dt)[..., None, None]
    after = before.mul_(decay).addcmul_((x * dt[..., None])[..., None], b[:, :, None])
    y = torch.matmul(after, c[..., None])[..., 0]
    if D is not None:
        y = y + D[:, None] * x
    return y[:, None], after


OPERATIONS: Mapping[str, Callable[[str, Functions, RecurrentContext], Callable[..., Any]]] = {
    "causal_conv1d_fn": _Convolution,
    "torch_chunk_gated_delta_rule": _DeltaRule,
    "chunk_kimi_delta_attention": _DeltaRule,
    "mamba2_chunk_scan": _StateSpace,
}
"""By the name of the function that transformers' layers call for a whole sequence."""


def recurrent_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that keep a state in a form that is known. Raises UnsupportedModel for those of another form."""
    known = "/"  # before the names of modules within the last layer whose recurrence is known
    for name, module in model.named_modules():
        called = _called(module)
        if called - {"causal_conv1d_fn"}:
            known = f"{name}."
        if hasattr(module, "A_log") and not f"{name}.".startswith(known):
            raise UnsupportedModel(
                f"{type(model).__name__} has layers that do not attend but keep a recurrent state ({name}), in a form "
                "that is not supported"
            )
        if called:
            yield name, module


def is_recurrent(model: nn.Module) -> bool:
    """Return True if any layer keeps a state. Raises UnsupportedModel for one in a form that is not known."""
    return bool(list(recurrent_modules(model)))


def take_plain_functions(model_class: type[nn.Module]) -> Callable[[], None]:
    """Have layers of a class' module compute with transformers' own functions; what is returned restores them.

    Transformers puts kernels of other packages (flash-linear-attention, causal-conv1d, mamba-ssm) in their place where
    those are installed. Such kernels compute on a GPU only.
    """
    found: dict[str, Any] = vars(sys.modules[model_class.__module__])
    kernels = {
        name: value
        for name, value in found.items()
        if isinstance(value, FunctionType)
        and inspect.unwrap(value) is not value
        # What the module has from elsewhere has decorators of its own, such as `contextmanager`.
        and inspect.unwrap(value).__module__ == model_class.__module__
    }
    found.update({name: _plain(inspect.unwrap(value)) for name, value in kernels.items()})
    return lambda: found.update(kernels)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, given no more keywords than it knows: layers also give those that other packages' know."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return function
    return lambda *args, **kwargs: function(*args, **{name: kwargs[name] for name in parameters if name in kwargs})


def read_states(model: PreTrainedModel) -> dict[str, StateShape]:
    """The state that each operation of recurrent layers keeps; none for a base without such layers."""
    if not is_recurrent(model):
        return {}
    context = RecurrentContext()
    install(model, context)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for _, module in recurrent_modules(model):
            del module.__dict__["forward"]
    return context.shapes


def install(model: nn.Module, context: RecurrentContext) -> None:
    """Have every recurrent layer of `model` compute with the states of `context`."""
    for name, module in recurrent_modules(model):
        forward = _forward(module)
        own = forward.__globals__
        operations = {called: OPERATIONS[called](f"{name}.{called}", own, context) for called in _called(module)}
        # The same code, which finds other functions by those names: nothing changes for other models of the process.
        made = FunctionType(
            forward.__code__, {**own, **operations}, forward.__name__, forward.__defaults__, forward.__closure__
        )
        made.__kwdefaults__ = forward.__kwdefaults__
        module.__dict__["forward"] = MethodType(made, module)


def _called(module: nn.Module) -> set[str]:
    """Names of the operations that the module's code calls."""
    return OPERATIONS.keys() & _forward(module).__code__.co_names


def _forward(module: nn.Module) -> FunctionType:
    """The function of the module's class that computes it, without decorators."""
    forward: FunctionType = inspect.unwrap(type(module).forward)
    return forward
