"""Finds the routed experts and routers of a base, as transformers has them, and their parameters' shapes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafleet.adapter_store.manifest import ModuleShape

ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
"""What transformers' experts are called with."""


def is_experts(module: nn.Module) -> bool:
    """Return True for experts of transformers' `use_experts_implementation`: tensors of matrices, one an expert."""
    known: Any = module
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    return (
        all(hasattr(known, flag) for flag in flags)
        and len(inspect.signature(type(module).forward).parameters) == 1 + len(ARGUMENTS)
        and all(name in dict(module.named_parameters(recurse=False)) for name in projections(module))
    )


def is_dense_experts(module: nn.Module) -> bool:
    """Return True for experts that all compute all rows, one expert's copy of them after another's (Llama 4)."""
    own = dict(module.named_parameters(recurse=False))
    return (
        type(module).__name__.endswith("Experts")
        and own.keys() == {"gate_up_proj", "down_proj"}
        and all(value.dim() == 3 for value in own.values())
        and hasattr(module, "act_fn")
        and [*inspect.signature(module.forward).parameters] == ["hidden_states"]
    )


def projections(experts: nn.Module) -> tuple[str, str]:
    """Names of the parameters that its rows go through, the first one first."""
    return ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")


def is_router(module: nn.Module, parent: nn.Module) -> bool:
    """Return True for what chooses among experts beside it: a module with a matrix of its own, but no linear one."""
    own = dict(module.named_parameters(recurse=False))
    return (
        not isinstance(module, nn.Linear | nn.Embedding | Conv1D)
        and "weight" in own
        and own["weight"].dim() == 2
        and any(is_experts(sibling) for sibling in parent.children())
        and "F.linear(" in inspect.getsource(type(module).forward)
    )


def expert_shapes(name: str, experts: nn.Module) -> Iterator[tuple[str, ModuleShape]]:
    """The parameters of experts that an adapter may target, in the module's own order, by their full names."""
    for leaf, parameter in experts.named_parameters(recurse=False):
        if leaf in projections(experts):
            num_experts, one, other = parameter.shape
            is_dense = not hasattr(experts, "is_transposed")
            in_dim, out_dim = (one, other) if is_dense or experts.is_transposed else (other, one)
            yield f"{name}.{leaf}", ModuleShape("experts", in_dim, out_dim, num_experts, is_swapped=is_dense)
