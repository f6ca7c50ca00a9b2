"""Reads how a model's body calls its layers, and how a layer joins its norms, attention and MLP, whatever its class.

A layer's own code runs with stand-ins in the places of its parts. What each is given and gives says how they are
joined: which norms come before and after a branch, what scales it, and whether both branches read the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.workers.model.norm_layers import AdapterNorm
from lorafleet.workers.model.stand_ins import CANNOT, Call, StandIn, copied, is_near, on_host

_BOUND = 1e-9
"""Relative difference in float64 that rounding explains."""
_WIDTH = 4
"""Of a hidden state among stand-ins."""


@dataclass(frozen=True, slots=True)
class BranchWiring:
    """One of a layer's branches: names of its children, and what its output is multiplied with at the end."""

    module: str
    norm: str | None
    """Ahead of it; None: it reads the residual."""
    post_norm: str | None
    factor: float
    is_tuple: bool
    """Whether the module's output is the first of several."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """A layer that adds attention and an MLP to its residual, in turn or at once."""

    attention: BranchWiring
    mlp: BranchWiring
    is_parallel: bool
    """Whether the MLP reads what attention reads."""
    arguments: Mapping[str, str]
    """Of attention's call -> the layer's argument that it is."""
    constants: Mapping[str, Any]
    """Others of attention's call, which are always the same."""


@dataclass(slots=True, eq=False)
class LayerCall:
    """A body's call of one layer."""

    arguments: dict[str, Any]
    """All but the hidden state, by name."""
    names: tuple[str, ...]
    """Of the layer's parameters, the hidden state's first."""
    hands_over: bool = False
    """Whether its very output is the input of the next layer, or of the norm behind the last."""


@dataclass(slots=True, eq=False)
class BodyCalls:
    """A body's calls of its layers."""

    layers: nn.ModuleList
    calls: list[LayerCall]
    norm: nn.Module | None
    """What takes the last layer's output."""


def untouched(module: nn.Module) -> nn.Module:
    """Transformers' own norm, if it is one with a substitute."""
    return module.base if isinstance(module, AdapterNorm) else module


def is_norm(module: nn.Module) -> bool:
    """Return True for a norm by its name, substituted or not."""
    return "Norm" in type(untouched(module)).__name__


def read_body(model: PreTrainedModel, max_model_len: int) -> BodyCalls | None:
    """Call the body with stand-ins for its layers, for tokens of far positions. None: its layers are not in a row."""
    body: Any = model.base_model
    layers = next(
        (
            module
            for module in body.modules()
            if isinstance(module, nn.ModuleList) and len(module) and all(map(attention_child, module))
        ),
        None,
    )
    embedding = model.get_input_embeddings()
    if layers is None or embedding is None:
        return None
    calls: list[LayerCall] = []
    gave: list[Tensor] = []
    norms: list[nn.Module] = []

    def stand_in(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if gave:
            calls[-1].hands_over = hidden_states is gave[-1]
        own = names[len(calls)]
        calls.append(LayerCall({**dict(zip(own[1:], args, strict=False)), **kwargs}, own))
        gave.append(hidden_states.clone())
        return gave[-1]

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if gave and len(gave) == len(layers) and args and args[0] is gave[-1]:
            norms.append(module)

    positions = sorted({0, 1, max_model_len // 2, max_model_len - 1})
    width = embedding.weight.shape[1]
    zeros = torch.zeros(1, len(positions), width, dtype=model.dtype, device=model.device)
    replaced = {module.base for module in body.modules() if isinstance(module, AdapterNorm)}
    known = [module for module in body.modules() if is_norm(module) and module not in replaced]
    hooks = [module.register_forward_pre_hook(note) for module in known]
    names = [tuple(inspect.signature(layer.forward).parameters) for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = stand_in
    embedding.__dict__["forward"] = lambda token_ids: zeros
    try:
        body(
            input_ids=torch.zeros(1, len(positions), dtype=torch.int64, device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            use_cache=False,
        )
    except CANNOT:
        return None
    finally:
        for module in (*layers, embedding):
            del module.__dict__["forward"]
        for hook in hooks:
            hook.remove()
    if len(calls) != len(layers):
        return None
    calls[-1].hands_over = len(norms) == 1
    return BodyCalls(layers, calls, norms[0] if norms else None)


def attention_child(layer: nn.Module) -> str | None:
    """The name of the layer's child that attends through transformers' attention functions."""
    names = [
        name
        for name, child in layer.named_children()
        if "attention_context" in child.__dict__ and isinstance(getattr(child, "layer_idx", None), int)
    ]
    if len(names) > 1:  # mixtures may know their layer too
        names = [name for name in names if "att" in name]
    return names[0] if len(names) == 1 else None


@dataclass(slots=True, eq=False)
class LayerRead:
    """Result of a layer's call with stand-ins."""

    wiring: Wiring | None
    attention_arguments: Mapping[str, Any] | None
    """Arguments of attention but its hidden state, on the host; None: it was not called once."""


def read_layer(layer: nn.Module, arguments: Mapping[str, Any]) -> LayerRead:
    """Call the layer with stand-ins for its children, and with these arguments beside a random hidden state."""
    attention = attention_child(layer)
    others = [
        name
        for name, child in layer.named_children()
        if name != attention and not is_norm(child) and not isinstance(child, nn.Dropout)
    ]
    nothing = LayerRead(None, None)
    if attention is None or len(others) != 1:
        return nothing
    (mlp,) = others
    given = {name: on_host(value, torch.float64) for name, value in arguments.items()}
    num_tokens = _num_tokens(given)
    for is_tuple in (False, True):
        calls: list[Call] = []
        children = {
            name: StandIn(untouched(child), name, calls)
            for name, child in layer.named_children()
            if not isinstance(child, nn.Dropout)
        }
        children[attention].is_tuple, children[mlp].is_tuple = True, is_tuple
        hidden = torch.randn(1, num_tokens, _WIDTH, dtype=torch.float64)
        try:
            out = copied(layer, children, torch.float64)(hidden, **given)
        except CANNOT:
            continue
        by_attention = [call.arguments for call in calls if call.name == attention]
        if not isinstance(out, Tensor) or len(by_attention) != 1:
            return nothing
        wiring = _Reading(calls, attention, mlp, is_tuple, given).wiring(hidden, out)
        return LayerRead(wiring, by_attention[0])
    return nothing


_Arguments = tuple[Mapping[str, str], Mapping[str, Any]]


class _Reading:
    """The calls of a layer's stand-ins, read in their order."""

    def __init__(self, calls: list[Call], attention: str, mlp: str, is_tuple: bool, given: Mapping[str, Any]) -> None:
        self.calls = calls
        self.attention, self.mlp = attention, mlp
        self.is_tuple = is_tuple
        self.given = given

    def wiring(self, hidden: Tensor, out: Tensor) -> Wiring | None:
        names = [call.name for call in self.calls]
        if names.count(self.mlp) != 1 or names.index(self.attention) > names.index(self.mlp):
            return None
        first = self._branch_input(self.attention, hidden)
        arguments = self._arguments()
        if first is None or arguments is None:
            return None
        norm, read = first
        attention = self._popped(self.attention)
        if self.calls[0].name == self.mlp and self.calls[0].given is read and norm is not None:
            mlp = self._popped(self.mlp)
            factor = _factor(out - hidden, attention + mlp)
            if self.calls or factor is None:
                return None
            branches = [BranchWiring(name, norm, None, factor, False) for name in (self.attention, self.mlp)]
            return self._made(branches, arguments, is_parallel=True)
        post_norm, attention = self._post(attention)
        middle = self.calls[0].given
        factor = _factor(middle - hidden, attention)
        second = self._branch_input(self.mlp, middle)
        if factor is None or second is None:
            return None
        branches = [BranchWiring(self.attention, norm, post_norm, factor, True)]
        norm, _ = second
        post_norm, mlp = self._post(self._popped(self.mlp))
        factor = _factor(out - middle, mlp)
        if self.calls or factor is None:
            return None
        branches.append(BranchWiring(self.mlp, norm, post_norm, factor, self.is_tuple))
        return self._made(branches, arguments, is_parallel=False)

    def _made(self, branches: list[BranchWiring], arguments: _Arguments, *, is_parallel: bool) -> Wiring:
        attention, mlp = branches
        return Wiring(attention, mlp, is_parallel, *arguments)

    def _popped(self, name: str) -> Tensor:
        call = self.calls.pop(0)
        assert call.name == name
        return call.gave

    def _branch_input(self, name: str, hidden: Tensor) -> tuple[str | None, Tensor] | None:
        """The norm ahead of the branch, and what the branch reads; its own call comes next then."""
        norm = None
        if self.calls[0].name != name:
            call = self.calls.pop(0)
            if call.given is not hidden:
                return None
            norm, hidden = call.name, call.gave
        call = self.calls[0]
        return (norm, hidden) if call.name == name and call.given is hidden else None

    def _post(self, gave: Tensor) -> tuple[str | None, Tensor]:
        """The norm behind the branch, and what comes out of it."""
        if self.calls and self.calls[0].given is gave and self.calls[0].name != self.mlp:
            call = self.calls.pop(0)
            return call.name, call.gave
        return None, gave

    def _arguments(self) -> _Arguments | None:
        """Attention's arguments by those of the layer, and constants; None if it makes others itself."""
        found: dict[str, str] = {}
        constants: dict[str, Any] = {}
        (call,) = (call for call in self.calls if call.name == self.attention)
        for name, value in call.arguments.items():
            names = [name, *self.given]
            same = next((other for other in names if other in self.given and self.given[other] is value), None)
            if same is not None:
                found[name] = same
            elif value is None or isinstance(value, bool | int | float | str):
                constants[name] = value
            else:
                return None
        return found, constants


def _factor(sum_of: Tensor, branch: Tensor) -> float | None:
    """The number that the branch is multiplied with to make the sum; None if there is none."""
    factor = float((sum_of * branch).sum() / (branch * branch).sum())
    if not is_near(branch * factor, sum_of, _BOUND):
        return None
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor


def _num_tokens(arguments: Mapping[str, Any]) -> int:
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    tensors += [each for value in arguments.values() if isinstance(value, tuple) for each in value]
    return next((tensor.shape[1] for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim() > 1), 1)
