"""Substitutes for a base's routed experts and routers: transformers' own products, and each row's own adapter.

Experts are a module of ours. A router stays transformers', and only its weight is of a class that adds LoRA in the
product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafleet.kernels import fused, ops
from lorafleet.kernels.routing import Routed, combine, repeat, route, spread
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import LoraWeights
from lorafleet.workers.model.experts import is_dense_experts, projections
from lorafleet.workers.model.fused_mlp import gate_of
from lorafleet.workers.model.lora_context import LoraContext
from lorafleet.workers.ranks import Ranks

MOST_ROWS_OF_KERNEL = 32
"""For each matrix, in the mean, that our own kernel multiplies: beyond, arithmetic counts, and torch's is better."""
_ALIGNED = 8
"""Elements of 16 bytes of bfloat16, of which torch wants the rows of a grouped product to be multiples."""


class LoraExperts(nn.Module):
    """Experts as transformers computes them, with LoRA on both of their projections.

    On a GPU nothing waits for the device; in bfloat16 it is fast too. The weights stay transformers' tensors.
    """

    def __init__(
        self,
        name: str,
        experts: nn.Module,
        weights: dict[str, LoraWeights],
        slot_stride: int,
        context: LoraContext,
        ranks: Ranks | None = None,
        first_expert: int = 0,
    ) -> None:
        """`weights` by the projection's name, as `AdapterPool.expert_weights` gives them.

        ranks: those that have the other experts, if `experts` has those from `first_expert` on only.
        """
        super().__init__()
        self.name = name
        self.experts: Any = experts
        self.up_name, self.down_name = projections(experts)
        self.lora = weights
        self.slot_stride = slot_stride
        self.context = context
        self.ranks = ranks
        self.first_expert = first_expert
        self.num_experts = int(getattr(experts, self.down_name).shape[0])
        gate: Any = experts
        self._activation = gate_of(gate._apply_gate) if gate.has_gate else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (rows, hidden); top_k_index and top_k_weights: (rows, top_k) -> (rows, hidden)."""
        experts = self.experts
        if self.ranks is not None:
            own = top_k_index - self.first_expert
            is_here = (own >= 0) & (own < self.num_experts)
            top_k_index, top_k_weights = own.where(is_here, self.num_experts), top_k_weights.where(is_here, 0.0)
        segments = self.context.segments_at("body", self.name, hidden_states.shape[0])
        has_lora = segments is not None and segments.has_lora and not self.context.skips_experts
        routed = route(top_k_index, self.num_experts, segments if has_lora else None, self.slot_stride)
        up = self._project(spread(hidden_states, top_k_index, routed), self.up_name, routed, top_k_index)
        if self._activation is not None:
            up = fused.gated(up, self._activation)
        else:
            up = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
        down = self._project(up, self.down_name, routed, top_k_index)
        if getattr(experts, "has_post_expert_norm", False):  # Since transformers 5.20.
            down = experts.post_expert_norm(down)
        out = None if self.ranks is None else self.ranks.partial(len(hidden_states), down.shape[1], hidden_states)
        combined = combine(down, top_k_index, top_k_weights, routed, self.num_experts, hidden_states.dtype, out)
        return combined if self.ranks is None else self.ranks.all_reduce(combined)

    def _project(self, x: Tensor, name: str, routed: Routed, top_k_index: Tensor) -> Tensor:
        """x: (routed, in_dim) in order -> (routed, out_dim), zero where a row has no expert."""
        weight: Tensor = getattr(self.experts, name)
        matrices = weight if self.experts.is_transposed else weight.transpose(-2, -1)
        y = grouped_product(x.to(weight.dtype), matrices, routed.expert_ends)
        if self.experts.has_bias:
            owners = top_k_index.reshape(-1)[routed.order].clamp(max=self.num_experts - 1)
            y += getattr(self.experts, f"{name}_bias")[owners]
        if routed.segments is not None:
            ops.add_lora(x.to(weight.dtype).contiguous(), self.lora[name], routed.segments, y)
        return y


class LoraDenseExperts(nn.Module):
    """Experts that all compute all rows, scaled to zero where a row is not theirs, with LoRA on both projections."""

    def __init__(
        self, name: str, experts: nn.Module, weights: dict[str, LoraWeights], slot_stride: int, context: LoraContext
    ) -> None:
        super().__init__()
        self.name = name
        self.experts: Any = experts
        self.lora = weights
        self.slot_stride = slot_stride
        self.context = context

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: (num_experts * rows, hidden), an expert's rows after another's -> the same."""
        num_experts, num_all = self.experts.gate_up_proj.shape[0], hidden_states.shape[0]
        segments = self.context.segments_at("body", self.name, num_all // num_experts)
        if segments is not None:
            has_lora = segments.has_lora and not self.context.skips_experts
            segments = repeat(num_experts, segments, self.slot_stride) if has_lora else None
        up = self._project(hidden_states, "gate_up_proj", segments)
        gate, up = up.chunk(2, dim=-1)
        return self._project(up * self.experts.act_fn(gate), "down_proj", segments)

    def _project(self, x: Tensor, name: str, segments: Segments | None) -> Tensor:
        matrices: Tensor = getattr(self.experts, name)
        y = torch.bmm(x.view(len(matrices), -1, matrices.shape[1]), matrices).view(x.shape[0], -1)
        if segments is not None:
            ops.add_lora(x, self.lora[name], segments, y)
        return y


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """x: (rows, in_dim), those of one matrix after another's; matrices: (n, in_dim, out_dim) -> (rows, out_dim).

    ends: (n,) int32, the row after each matrix's last; later rows become zero, on a GPU anything.
    """
    if x.is_cuda:
        if x.shape[0] <= MOST_ROWS_OF_KERNEL * len(matrices):
            from lorafleet.kernels import grouped_triton

            return grouped_triton.product(x, matrices, ends)
        is_aligned = x.shape[1] % _ALIGNED == 0 and matrices.shape[2] % _ALIGNED == 0
        if x.dtype == torch.bfloat16 and is_aligned:
            # In torch 2.10 and later it has a public name too.
            product: Tensor = torch._grouped_mm(x, matrices, offs=ends)
            return product
        return every_product(x, matrices, ends)
    y = x.new_zeros(x.shape[0], matrices.shape[2])
    start = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        if start < end:
            torch.mm(x[start:end], matrix, out=y[start:end])
        start = end
    return y


class RouterWeight(Tensor):
    """A router's matrix whose `F.linear` adds each row's own LoRA, whatever dtype it is taken in; else a plain one."""

    lora: LoraWeights
    router: str
    context: LoraContext

    @classmethod
    def of(cls, weight: Tensor, name: str, lora: LoraWeights, context: LoraContext) -> RouterWeight:
        """weight: (num_experts, hidden), `name` of the router."""
        made = weight.detach().as_subclass(cls)
        made.router, made.lora, made.context = name, lora, context
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Add LoRA to a product; keep the class where only the dtype changes."""
        plain = [value.as_subclass(Tensor) if isinstance(value, cls) else value for value in args]
        given = {
            key: value.as_subclass(Tensor) if isinstance(value, cls) else value for key, value in (kwargs or {}).items()
        }
        made = func(*plain, **given)
        if func in (F.linear, torch._C._nn.linear) and isinstance(args[1], cls):
            return args[1].added(plain[0], made)
        if func in (Tensor.to, Tensor.type, Tensor.float) and isinstance(args[0], cls) and isinstance(made, Tensor):
            return cls.of(made, args[0].router, args[0].lora, args[0].context)
        return made

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., hidden), and y: (..., num_experts) its product -> y with LoRA's."""
        rows = x.reshape(-1, x.shape[-1])
        segments = self.context.segments_at("body", self.router, rows.shape[0])
        if segments is not None and segments.has_lora:
            ops.add_lora(rows.to(self.lora.pool.dtype), self.lora, segments, y.view(-1, y.shape[-1]))
        return y


def substitute_router(model: nn.Module, name: str, weights: LoraWeights, context: LoraContext) -> None:
    """Give the router `name` a weight that adds LoRA."""
    router = model.get_submodule(name)
    weight = router._parameters.pop("weight")
    assert isinstance(weight, Tensor), name
    # As before among the parameters, where its size counts and nothing computes with it.
    router.register_parameter("own_weight", nn.Parameter(weight.detach(), requires_grad=False))
    router.__dict__["weight"] = RouterWeight.of(weight, name, weights, context)


def every_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The same as `grouped_product` by a product of all rows with each matrix: slow, but without a synchronisation."""
    places = torch.arange(x.shape[0], device=x.device)
    owners = torch.searchsorted(ends.to(torch.int64), places, right=True)
    y = x.new_zeros(x.shape[0], matrices.shape[2])
    for index, matrix in enumerate(matrices):
        y = torch.where((owners == index)[:, None], x @ matrix, y)
    return y


def substitute_experts(
    model: nn.Module,
    name: str,
    weights: dict[str, LoraWeights],
    slot_stride: int,
    context: LoraContext,
    ranks: Ranks | None = None,
    first_expert: int = 0,
) -> None:
    """Put LoRA experts in the place of `name`. The rest as in `LoraExperts`."""
    experts = model.get_submodule(name)
    if is_dense_experts(experts):
        model.set_submodule(name, LoraDenseExperts(name, experts, weights, slot_stride, context))
    else:
        model.set_submodule(name, LoraExperts(name, experts, weights, slot_stride, context, ranks, first_expert))
