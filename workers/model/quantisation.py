"""A base whose linear weights are fp8: rounded while it is loaded, or as its checkpoint has them.

Scales of weights that are rounded here are powers of two (`kernels/fp8.py`), so that such weights are exact in bfloat16
and float32 too. A checkpoint's own scales stand beside dequantised weights as the buffer `fp8_scales` until
`pack_weights`. A GPU stores both kinds as fp8 and rounds activations to fp8 as well, row by row. A CPU keeps them in
the base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.adapter_store.manifest import BaseGeometry, Dtype
from lorafleet.kernels import fp8
from lorafleet.kernels.fp8_values import DTYPE, Fp8Weight
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.model.geometry import projection_groups
from lorafleet.workers.ranks import Ranks

MIN_CAPABILITY = (8, 9)
"""Of GPUs that multiply fp8."""


def why_not_multiplied(device: torch.device, dtype: Dtype) -> str | None:
    """Return why a GPU does not multiply fp8 in a base of this dtype; None where it does."""
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return (
            f"needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later, and "
            f"{torch.cuda.get_device_name(device)} is older"
        )
    return None if dtype == "bfloat16" else f"is computed in bfloat16 on a GPU, not in {dtype}"


def refuse_device(device: torch.device, dtype: Dtype) -> None:
    """Raise WorkerConfigError if fp8 weights cannot be served on the device in this dtype."""
    reason = why_not_multiplied(device, dtype) if device.type == "cuda" else None
    if reason is not None:
        raise WorkerConfigError(f"model.quantization: fp8 {reason}: use quantization: none")


def keep_scales(model: PreTrainedModel, parameter: str, scales: Tensor | None) -> None:
    """Put a checkpoint's scales, (out_dim,) float32, beside the weight that was dequantised with them."""
    if scales is None or not parameter.endswith(".weight"):
        return
    module = _linear(model, parameter.removesuffix(".weight"))
    if module is not None and scales.shape == module.weight.shape[:1]:
        module.register_buffer("fp8_scales", scales, persistent=False)


@torch.no_grad()
def round_weights(model: PreTrainedModel, geometry: BaseGeometry, ranks: Ranks) -> None:
    """Round the weights of the body's linear modules to fp8, and keep them in their dtype.

    Modules that share their input have one scale, on all ranks that have parts of them. Those that come from fp8,
    embedding, head and norms stay as they are.
    Raises UnsupportedModel if there is nothing to round.
    """
    groups = list(_groups(model, geometry))
    if not groups:
        raise UnsupportedModel(f"{type(model).__name__} has no linear module that model.quantization: fp8 could round")
    for group in groups:
        if _own_scales(group) is None:
            rounded = _rounded(group, ranks)
            for linear, weight in zip(group, rounded, strict=True):
                linear.weight.copy_(fp8.dequantise(weight, linear.weight.dtype))
                linear.register_buffer("fp8_scales", weight.scales, persistent=False)


def has_fp8(model: PreTrainedModel, geometry: BaseGeometry) -> bool:
    """Return True if `pack_weights` finds weights to store."""
    return any(_can_pack(group) for group in _groups(model, geometry))


@contextmanager
def rounding_inputs(model: PreTrainedModel, geometry: BaseGeometry) -> Iterator[None]:
    """Within it, the linear modules that `pack_weights` would store see their inputs rounded to fp8 rows."""

    def round_input(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        rows = inputs[0].flatten(0, -2)
        return (fp8.dequantise(fp8.quantise_rows(rows), rows.dtype).view_as(inputs[0]),)

    groups = [group for group in _groups(model, geometry) if _can_pack(group)]
    hooks = [linear.register_forward_pre_hook(round_input) for group in groups for linear in group]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pack_weights(model: PreTrainedModel, geometry: BaseGeometry) -> None:
    """Store the weights that have scales beside them as fp8, which halves their memory. They lose nothing by it.

    A group of modules that share their input, of which some have none, stays as it is. So do parts of odd sizes.
    """
    for group in _groups(model, geometry):
        scales = _own_scales(group) if _can_pack(group) else None
        for linear, own in zip(group, scales or (), strict=scales is not None):
            values = fp8.values_at(linear.weight.data, own)
            linear.weight = nn.Parameter(values, requires_grad=False)


def packed(group: Sequence[nn.Module]) -> Fp8Weight | None:
    """Return the weights of a group's modules, one below the other, if `pack_weights` stored them as fp8."""
    weights = [linear.weight.data for linear in group if isinstance(linear.weight, Tensor)]
    if any(weight.dtype != DTYPE for weight in weights):
        return None
    scales = torch.cat([scale for linear in group if isinstance(scale := linear.fp8_scales, Tensor)])
    return Fp8Weight(torch.cat(weights), scales, is_uniform=bool((scales == scales[0]).all()))


def _own_scales(group: Sequence[nn.Module]) -> list[Tensor] | None:
    """The scales beside a group's weights; None unless all have some."""
    scales = [scale for linear in group if isinstance(scale := getattr(linear, "fp8_scales", None), Tensor)]
    return scales if len(scales) == len(group) else None


def _can_pack(group: Sequence[nn.Linear]) -> bool:
    """Return True if the weights have scales, and the parts that are here can be multiplied as fp8."""
    fits = all(fp8.fits(linear.out_features, linear.in_features) for linear in group)
    return fits and _own_scales(group) is not None


def _rounded(group: Sequence[nn.Linear], ranks: Ranks) -> list[Fp8Weight]:
    weights = [linear.weight.data for linear in group]
    largest = ranks.gather_columns(fp8.largest_of(*weights).view(1, 1)).amax()
    whole = fp8.quantise_weight(*weights, largest=largest)
    widths = [linear.out_features for linear in group]
    parts = zip(torch.split(whole.values, widths), torch.split(whole.scales, widths), strict=True)
    return [Fp8Weight(values, scales) for values, scales in parts]


def _linear(model: PreTrainedModel, name: str) -> nn.Linear | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if type(module) is nn.Linear else None


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
