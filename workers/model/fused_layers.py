"""Decoder layers run with one launch between every two products, instead of transformers' own code.

`substitute` looks at what each module of a model does, not at its class. Norms, gated MLPs and attention that the fused
kernels can compute get another forward. A layer that only joins such parts, in one of the known ways, is computed as a
whole. What it adds to the residual, the norms around that, and the next layer's norm are one launch then. All modules
keep their places and names. Whatever is not recognised runs as transformers has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.kernels import fused
from lorafleet.kernels.norms import PLAIN, Branch, Norm, NormRule
from lorafleet.workers.model.fused_mlp import FusedMLP, mlp_of
from lorafleet.workers.model.fused_parts import (
    ANGLES,
    FusedAttention,
    FusedNorm,
    Input,
    Output,
    attention_of,
    rule_of,
)
from lorafleet.workers.model.lora_layers import FusedProjection
from lorafleet.workers.model.norm_layers import AdapterNorm
from lorafleet.workers.model.paged_attention import AttentionContext
from lorafleet.workers.model.wiring import (
    BodyCalls,
    BranchWiring,
    Wiring,
    attention_child,
    is_norm,
    read_body,
    read_layer,
    untouched,
)

Rules = dict[tuple[object, ...], NormRule | None]
"""Rules of norms, by what tells them apart."""
Compute = Callable[[Input, Mapping[str, Any]], Output]
"""A layer's branch: its input and the layer's arguments -> what is added to the residual."""


class Entry:
    """The way into a branch or the head: what is left to add goes into the residual, and the sum is normed."""

    def __init__(self, norm: nn.Module | None, rules: Rules, reader: FusedProjection | None = None) -> None:
        """`norm`: None where the residual itself is read. `reader`: the projection that reads the result."""
        self.norm, self._reader = norm, reader
        self._rule = None if norm is None else rule_of(untouched(norm), rules)

    @property
    def tabled(self) -> str | None:
        """The parameter that adapters may replace in a captured step."""
        is_tabled = isinstance(self.norm, AdapterNorm) and self._rule is not None
        return f"{self.norm.name}.weight" if is_tabled and isinstance(self.norm, AdapterNorm) else None

    def __call__(self, x: Output | None, residual: Tensor, branch: Branch = PLAIN) -> Input:
        """x: (rows, width), to be added to `residual` in place by way of `branch`; None: nothing is."""
        if self.norm is None or self._rule is None:
            if x is not None:
                fused.add(x.values, residual, x.scales, branch)
            return Input(residual if self.norm is None else self.norm(residual[None])[0])
        weight = untouched(self.norm).get_parameter("weight")
        norm = Norm(weight, self._rule)
        what = (residual, norm) if x is None else (x.values, norm, residual, x.scales, branch)
        if self._reader is None or self._reader.fp8_weight is None:
            y = Input(fused.rms_norm(*what))
        else:
            y = Input(*fused.rms_norm_fp8(*what))
        return self._with_own(self.norm, y, residual) if isinstance(self.norm, AdapterNorm) else y

    def _with_own(self, module: AdapterNorm, y: Input, summed: Tensor) -> Input:
        """The rows of adapters with a weight of their own are normed with that."""
        assert self._rule is not None
        segments = module.context.segments_at(module.place, module.name, summed.shape[0])
        if summed.is_cuda and module.own_weight is not None and segments is not None:
            if module.context.has_extras:
                from lorafleet.kernels import own_triton

                own_triton.norm_rows(summed, y.values, module.own_weight, segments, self._rule)
                return Input(y.values)
            return y
        replaced = module.replaced(summed.shape[0])
        for rows, parameters in replaced:
            own = fused.rms_norm(summed.index_select(0, rows), Norm(parameters["weight"], self._rule))
            y.values.index_copy_(0, rows, own)
        return Input(y.values) if replaced else y


class Exit:
    """The way out of a branch: a norm, if there is one, and a factor."""

    def __init__(self, norm: nn.Module | None, factor: float, rules: Rules) -> None:
        self._norm = norm
        rule = None if norm is None else rule_of(untouched(norm), rules)
        self._after_norm = Branch(factor=factor)
        self._branch = self._after_norm
        self._is_fused = norm is None or rule is not None
        if norm is not None and rule is not None:
            self._branch = Branch(Norm(untouched(norm).get_parameter("weight"), rule), factor)

    def __call__(self, x: Output) -> tuple[Output, Branch]:
        """x: (rows, width) -> what is to be added, and by which way."""
        norm = self._norm
        has_own = isinstance(norm, AdapterNorm) and norm.context.has_extras
        if norm is None or (self._is_fused and not has_own):
            return x, self._branch
        return Output(norm(x.finished()[None])[0]), self._after_norm


@dataclass(slots=True, eq=False)
class Carry:
    """The sum that a layer leaves to the next one, or to the norm behind the last."""

    _hidden: Tensor | None = None
    _left: tuple[Output, Branch] | None = None

    def give(self, hidden: Tensor, x: Output, branch: Branch) -> Tensor:
        """Return `hidden`, which lacks x."""
        self._hidden, self._left = hidden, (x, branch)
        return hidden

    def take(self, hidden: Tensor) -> tuple[Output | None, Branch]:
        """Return what `hidden` lacks."""
        left = self._left if self._hidden is hidden else None
        assert left is not None or self._hidden is None, "a layer was not given what the one before it gave"
        self._hidden, self._left = None, None
        return (None, PLAIN) if left is None else left


class FusedLayer:
    """Stands for the forward of a decoder layer."""

    def __init__(
        self, layer: nn.Module, names: Sequence[str], wiring: Wiring, parts: Parts, carry: Carry, *, hands_over: bool
    ) -> None:
        """`names`: of its parameters. `hands_over`: whether what it returns goes to another that knows `carry`."""
        self._layer, self._names, self._carry, self._hands_over = layer, names, carry, hands_over
        self._is_parallel = wiring.is_parallel
        attention, mlp = layer.get_submodule(wiring.attention.module), layer.get_submodule(wiring.mlp.module)
        part, mlp_part = parts.attentions.get(attention), parts.mlps.get(mlp)
        self._attend = _attention(attention, part, wiring)
        self._feed = _mlp(mlp, mlp_part, wiring.mlp)
        rules = parts.rules
        self.entries = [Entry(_child(layer, wiring.attention.norm), rules, None if part is None else part.reader)]
        if not wiring.is_parallel:
            reader = None if mlp_part is None else mlp_part.reader
            self.entries.append(Entry(_child(layer, wiring.mlp.norm), rules, reader))
        self._exits = [
            Exit(_child(layer, branch.post_norm), branch.factor, rules) for branch in (wiring.attention, wiring.mlp)
        ]

    def __call__(self, hidden_states: Tensor, *args: Any, **arguments: Any) -> Tensor:
        """hidden_states: (1, rows, width) -> the same shape."""
        arguments.update(zip(self._names[1:], args, strict=False))
        x, branch = self._carry.take(hidden_states)
        if x is None:
            hidden_states = hidden_states.clone()  # it is added to in place
        residual = hidden_states[0]
        normed = self.entries[0](x, residual, branch)
        x, branch = self._exits[0](self._attend(normed, arguments))
        if self._is_parallel:
            left = self._feed(normed, arguments)
            fused.add(x.values, residual, x.scales, branch)
        else:
            left = self._feed(self.entries[1](x, residual, branch), arguments)
        x, branch = self._exits[1](left)
        # Hooks are to see the sum.
        if self._hands_over and not self._layer._forward_hooks:
            return self._carry.give(hidden_states, x, branch)
        fused.add(x.values, residual, x.scales, branch)
        return hidden_states


class FusedEnd:
    """Stands for the forward of the norm behind the last layer."""

    def __init__(self, norm: nn.Module, rules: Rules, carry: Carry) -> None:
        self.entry = Entry(norm, rules)
        self._own, self._carry = norm.forward, carry

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: (1, rows, width) -> the same shape."""
        x, branch = self._carry.take(hidden_states)
        if x is None:
            y: Tensor = self._own(hidden_states)
            return y
        return self.entry(x, hidden_states[0], branch).values[None]


@dataclass(slots=True, eq=False)
class Parts:
    """The parts of a model that fused kernels compute."""

    num_layers: int = 0
    """That attend."""
    layers: list[FusedLayer] = field(default_factory=list)
    end: FusedEnd | None = None
    attentions: dict[nn.Module, FusedAttention] = field(default_factory=dict)
    mlps: dict[nn.Module, FusedMLP] = field(default_factory=dict)
    num_norms: int = 0
    rules: Rules = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """One word for it: `fused`, `in part` or `transformers'`."""
        if self.num_layers == len(self.layers) == len(self.attentions):
            return "fused"
        return "in part" if self.layers or self.attentions or self.mlps or self.num_norms else "transformers'"

    def tabled_norms(self) -> frozenset[str]:
        """Parameters of norms that adapters may replace in a captured step: those of ways into a branch or the head."""
        entries = [entry for layer in self.layers for entry in layer.entries]
        entries += [] if self.end is None else [self.end.entry]
        return frozenset(name for entry in entries if (name := entry.tabled) is not None)

    def __str__(self) -> str:
        found = {"layers": self.layers, "attentions": self.attentions, "MLPs": self.mlps}
        counts = [f"{len(each)} {name}" for name, each in found.items()]
        return f"fused of {self.num_layers} layers: {', '.join(counts)}, {self.num_norms} norms"


def substitute(model: PreTrainedModel, context: AttentionContext, max_model_len: int) -> Parts:
    """Let fused kernels compute what they can of `model`, whose leaves and attention have been substituted already."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return _substitute(model, context, max_model_len)


def _substitute(model: PreTrainedModel, context: AttentionContext, max_model_len: int) -> Parts:
    body = read_body(model, max_model_len)
    parts = Parts(num_layers=len(context.calls) if body is None else len(body.layers))
    reads = [] if body is None else [read_layer(layer, call.arguments) for layer, call in _pairs(body)]
    for module in [*model.modules()]:
        if (mlp := mlp_of(module)) is not None:
            parts.mlps[module] = mlp
    for (layer, call), read in zip([] if body is None else _pairs(body), reads, strict=True):
        name = attention_child(layer)
        assert name is not None
        module = layer.get_submodule(name)
        cos_and_sin = call.arguments.get(ANGLES)
        dtypes = (model.dtype, torch.float32)
        has_dtype = not isinstance(cos_and_sin, tuple) or all(each.dtype in dtypes for each in cos_and_sin)
        known = context.calls.get(module.layer_idx) if isinstance(module.layer_idx, int) else None
        if known is not None and read.attention_arguments is not None and has_dtype:
            found = attention_of(module, read.attention_arguments, known, context, parts.rules)
            if found is not None:
                parts.attentions[module] = found
    for module in [*model.modules()]:
        rule = rule_of(module, parts.rules) if is_norm(module) and not isinstance(module, AdapterNorm) else None
        if rule is not None:
            module.__dict__["forward"] = FusedNorm(module, rule)
            parts.num_norms += 1
    for part_of in (parts.mlps, parts.attentions):
        for module, part in part_of.items():
            module.__dict__["forward"] = part.forward
    if body is not None:
        _substitute_layers(body, [read.wiring for read in reads], parts)
    return parts


def _substitute_layers(body: BodyCalls, wirings: list[Wiring | None], parts: Parts) -> None:
    carry = Carry()
    last = len(wirings) - 1
    for index, ((layer, call), wiring) in enumerate(zip(_pairs(body), wirings, strict=True)):
        if wiring is None:
            continue
        has_next = body.norm is not None if index == last else wirings[index + 1] is not None
        fused_layer = FusedLayer(layer, call.names, wiring, parts, carry, hands_over=call.hands_over and has_next)
        parts.layers.append(fused_layer)
        layer.__dict__["forward"] = fused_layer
    if body.norm is not None and body.calls[last].hands_over and wirings[last] is not None:
        parts.end = FusedEnd(body.norm, parts.rules, carry)
        body.norm.__dict__["forward"] = parts.end


def _pairs(body: BodyCalls) -> list[tuple[nn.Module, Any]]:
    return list(zip(body.layers, body.calls, strict=True))


def _child(layer: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else layer.get_submodule(name)


def _attention(module: nn.Module, part: FusedAttention | None, wiring: Wiring) -> Compute:
    if part is not None:
        angles = wiring.arguments.get(ANGLES)
        return lambda x, given: part(x, part.angles(None if angles is None else given[angles]))

    def compute(x: Input, given: Mapping[str, Any]) -> Output:
        arguments = {name: given[source] for name, source in wiring.arguments.items()}
        return Output(module(x.values[None], **arguments, **wiring.constants)[0].reshape(x.values.shape))

    return compute


def _mlp(module: nn.Module, part: FusedMLP | None, wiring: BranchWiring) -> Compute:
    if part is not None:
        return lambda x, _: part(x)

    def compute(x: Input, _: Mapping[str, Any]) -> Output:
        y = module(x.values[None])
        return Output((y[0] if wiring.is_tuple else y).reshape(x.values.shape))

    return compute
