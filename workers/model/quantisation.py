"""A base whose linear weights are rounded to fp8 while it is loaded.

Scales are powers of two (`kernels/fp8.py`), so that rounded weights are exact in bfloat16 and float32 too.
A GPU stores them as fp8 and rounds activations to fp8 as well, row by row. A CPU keeps them in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.adapter_store.manifest import BaseGeometry, Dtype
from lorafleet.kernels import fp8
from lorafleet.kernels.fp8_values import Fp8Weight
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.model.geometry import projection_groups

MIN_CAPABILITY = (8, 9)
"""Of GPUs that multiply fp8."""


def refuse_device(device: torch.device, dtype: Dtype) -> None:
    """Raise WorkerConfigError if fp8 weights cannot be served on the device in this dtype."""
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        raise WorkerConfigError(
            f"model.quantization: fp8 needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or "
            f"later, and {torch.cuda.get_device_name(device)} is older: use quantization: none"
        )
    if dtype != "bfloat16":
        raise WorkerConfigError(f"model.quantization: fp8 is computed in bfloat16 on a GPU, not in {dtype}")


@torch.no_grad()
def round_weights(model: PreTrainedModel, geometry: BaseGeometry) -> None:
    """Round the weights of the body's linear modules to fp8, and keep them in their dtype.

    Modules that share their input have one scale. Embedding, head and norms stay as they are. Raises UnsupportedModel
    if there is nothing to round.
    """
    groups = list(_groups(model, geometry))
    if not groups:
        raise UnsupportedModel(f"{type(model).__name__} has no linear module that model.quantization: fp8 could round")
    for group in groups:
        for linear, weight in zip(group, _rounded(group), strict=True):
            linear.weight.copy_(fp8.dequantise(weight, linear.weight.dtype))


@contextmanager
def rounding_inputs(model: PreTrainedModel, geometry: BaseGeometry) -> Iterator[None]:
    """Within it, the linear modules that `pack_weights` would store see their inputs rounded to fp8 rows."""

    def round_input(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        rows = inputs[0].flatten(0, -2)
        return (fp8.dequantise(fp8.quantise_rows(rows), rows.dtype).view_as(inputs[0]),)

    hooks = [linear.register_forward_pre_hook(round_input) for group in _groups(model, geometry) for linear in group]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pack_weights(model: PreTrainedModel, geometry: BaseGeometry) -> None:
    """Store the weights that `round_weights` rounded as fp8, which halves their memory. They lose nothing by it."""
    for group in _groups(model, geometry):
        for linear, weight in zip(group, _rounded(group), strict=True):
            linear.weight = nn.Parameter(weight.values, requires_grad=False)
            linear.register_buffer("fp8_scales", weight.scales, persistent=False)


def packed(group: Sequence[nn.Module]) -> Fp8Weight | None:
    """Return the weights of a group's modules, one below the other, if `pack_weights` stored them as fp8."""
    scales = [scale for linear in group if isinstance(scale := getattr(linear, "fp8_scales", None), Tensor)]
    values = [linear.weight.data for linear in group if isinstance(linear.weight, Tensor)]
    return Fp8Weight(torch.cat(values), torch.cat(scales)) if len(scales) == len(group) else None


def _rounded(group: Sequence[nn.Linear]) -> list[Fp8Weight]:
    whole = fp8.quantise_weight(*(linear.weight.data for linear in group))
    widths = [linear.out_features for linear in group]
    parts = zip(torch.split(whole.values, widths), torch.split(whole.scales, widths), strict=True)
    return [Fp8Weight(values, scales) for values, scales in parts]


def _groups(model: PreTrainedModel, geometry: BaseGeometry) -> Iterator[list[nn.Linear]]:
    """The linear modules that are rounded: those that share their input together."""
    head = model.get_output_embeddings()
    linear = [name for name, shape in geometry.modules.items() if shape.kind == "linear"]
    for names in projection_groups(linear):
        shapes, group = [geometry.modules[name] for name in names], [model.get_submodule(name) for name in names]
        fits = all(fp8.fits(shape.out_dim, shape.in_dim) for shape in shapes)
        linears = [module for module in group if type(module) is nn.Linear and module is not head]
        if fits and len(linears) == len(group):
            yield linears
