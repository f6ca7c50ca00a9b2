"""Gated MLPs that fused kernels compute, told by what they do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorafleet.kernels import fused
from lorafleet.kernels.norms import Activation
from lorafleet.workers.model.fused_parts import (
    LARGE,
    NUM_ROWS,
    Input,
    Output,
    groups_of,
    is_between,
    project,
    projections_standing,
)
from lorafleet.workers.model.lora_layers import FusedProjection
from lorafleet.workers.model.stand_ins import CANNOT, Call, copied, is_near
from lorafleet.workers.model.wiring import is_norm

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")


class FusedMLP:
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, gate_up: FusedProjection, down: FusedProjection, activation: Activation) -> None:
        self.reader, self._down, self._activation = gate_up, down, activation

    def __call__(self, x: Input) -> Output:
        """x: (rows, width) -> (rows, width)."""
        gate_up = project(self.reader, x)
        if self._down.fp8_weight is None:
            return project(self._down, Input(fused.gated(gate_up.values, self._activation, gate_up.scales)))
        return project(self._down, Input(*fused.gated_fp8(gate_up.values, self._activation, gate_up.scales)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Stands for the module's forward: (..., width) -> the same shape."""
        y = self(Input(hidden_states.reshape(-1, hidden_states.shape[-1]))).finished()
        return y.view(*hidden_states.shape[:-1], y.shape[-1])


def mlp_of(module: nn.Module) -> FusedMLP | None:
    """The part that the module is."""
    groups = groups_of(module)
    if groups is None or len(groups) != 2 or any(is_norm(child) for child in module.children()):
        return None
    downs = [group for group in groups if len(group.widths) == 1]
    for down in downs:
        (joined,) = (group for group in groups if group is not down)
        inner = down.weight.shape[1]
        if joined.widths in ([inner, inner], [2 * inner]):
            tried = [_activations(module, joined, down, spread) for spread in (1.0, LARGE)]
            for activation in ACTIVATIONS:
                if all(activation in found for found in tried):
                    return FusedMLP(joined, down, activation)
    return None


def gate_of(apply: Callable[[Tensor], Tensor]) -> Activation | None:
    """The activation with which a function of gate and up, side by side, is `fused.gated`; None if there is none."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        given = [torch.randn(NUM_ROWS, 16) * spread for spread in (1.0, LARGE)]
    for activation in ACTIVATIONS:
        try:
            if all(is_near(fused.gated(each, activation), apply(each)) for each in given):
                return activation
        except CANNOT:
            return None
    return None


def _activations(module: nn.Module, joined: FusedProjection, down: FusedProjection, spread: float) -> list[Activation]:
    """Activations that make of gate and up, with elements of this size, what the module makes of them."""
    x, gives = torch.randn(1, NUM_ROWS, 8), torch.randn(1, NUM_ROWS, 8)
    gate_up = torch.randn(1, NUM_ROWS, 2 * down.weight.shape[1]) * spread
    calls: list[Call] = []
    children = projections_standing(module, {id(joined): gate_up, id(down): gives}, calls)
    try:
        out = copied(module, children, torch.float32)(x)
    except CANNOT:
        return []
    if out is not gives or not is_between(calls, x, gives, len(children)):
        return []
    made = calls[-1].given[0]
    return [activation for activation in ACTIVATIONS if is_near(fused.gated(gate_up[0], activation), made)]
