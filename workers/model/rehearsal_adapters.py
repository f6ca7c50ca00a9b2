"""Random adapters of a rehearsal: laid into the pool, and applied to transformers' own model in the plainest way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafleet.adapter_store.manifest import (
    AdapterManifest,
    AdapterWeights,
    BaseGeometry,
    ModuleManifest,
    ModuleShape,
    shared_extra,
)
from lorafleet.workers.memory.adapter_pool import AdapterPool


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter of scaling 1."""

    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Module -> A and B, as `AdapterWeights` has them."""
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter of a norm -> (width,): what the adapter has in its place."""


def publish(
    pool: AdapterPool, model: nn.Module, geometry: BaseGeometry, rank: int, generator: torch.Generator
) -> Iterator[Adapter]:
    """Put random adapters into the slots 0 and 1, as long as they fit, and yield them.

    Both are on every module. The second also replaces every parameter of a norm that an adapter may replace.
    """
    for slot in range(2):
        names = sorted(geometry.vectors) if slot else []
        adapter = Adapter(
            {name: _random(shape, rank, generator) for name, shape in geometry.modules.items()},
            {name: _beside(model.get_parameter(name), generator) for name in names},
        )
        manifest = _manifest(str(slot), geometry, rank, adapter)
        if not adapter.factors or not pool.can_allocate(manifest):
            return
        allocation = pool.allocate(manifest)
        assert allocation.slot == slot, "slots are given in their order"
        arrays = {name: (a.numpy(), b.numpy()) for name, (a, b) in adapter.factors.items()}
        rows = {name: value.numpy()[None] for name, value in adapter.replaced.items()}
        pool.publish(pool.upload(allocation, AdapterWeights.of(manifest, "float32", arrays, rows)))
        yield adapter


@contextmanager
def applied(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Let an untouched model compute with an adapter."""
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name, value in adapter.replaced.items():
            parameter = model.get_parameter(name)
            stack.enter_context(_changed(parameter, value - parameter))
        for name, (a, b) in adapter.factors.items():
            module = modules.get(name)
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
                stack.callback(module.register_forward_hook(_adding(a, b)).remove)
            elif module is not None:
                stack.enter_context(_changed(module.get_parameter("weight"), b.T @ a))
            else:
                experts, matrices = modules[name.rpartition(".")[0]], model.get_parameter(name)
                n, is_transposed = len(matrices), getattr(experts, "is_transposed", True)
                delta = torch.bmm(a.view(n, -1, a.shape[1]).transpose(1, 2), b.view(n, -1, b.shape[1]))
                stack.enter_context(_changed(matrices, delta if is_transposed else delta.transpose(1, 2)))
        yield


def _random(shape: ModuleShape, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    num_rows = rank * shape.num_experts
    a_shape = (shape.in_dim, rank) if shape.kind == "embedding" else (num_rows, shape.in_dim)
    a, b = (torch.randn(size, generator=generator) for size in (a_shape, (num_rows, shape.out_dim)))
    return a.mul_(a.shape[1] ** -0.5), b.mul_(0.5 * shape.out_dim**-0.5)


def _beside(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Another value of a norm's parameter, about as large."""
    return parameter.detach() + 0.3 * torch.randn(parameter.shape, generator=generator)


def _manifest(name: str, geometry: BaseGeometry, rank: int, adapter: Adapter) -> AdapterManifest:
    num_elements = sum(shape.num_elements(rank) for shape in geometry.modules.values())
    return AdapterManifest(
        version=name,
        rank=rank,
        targets=tuple(sorted({module.rpartition(".")[2] for module in geometry.modules})),
        modules=tuple(ModuleManifest(module, rank, 1.0) for module in geometry.modules),
        num_bytes=4 * (num_elements + sum(value.numel() for value in adapter.replaced.values())),
        extras=tuple(shared_extra(each, "replaced", 1, len(value)) for each, value in adapter.replaced.items()),
    )


def _adding(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds LoRA's product to what a linear module or an embedding gives."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        h: Tensor = a[args[0]] if isinstance(module, nn.Embedding) else args[0] @ a.T
        summed: Tensor = output + h @ b * getattr(module, "embed_scale", 1.0)
        return summed

    return add


@contextmanager
def _changed(parameter: nn.Parameter, delta: Tensor) -> Iterator[None]:
    """Add LoRA's product to a matrix, for a while."""
    own = parameter.data
    parameter.data = own + delta
    try:
        yield
    finally:
        parameter.data = own
