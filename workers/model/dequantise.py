"""The matrices that quantised weights stand for: the tensors of a weight, and its values from them.

Layouts: compressed-tensors' documentation, AutoAWQ's `gemm` and AutoGPTQ's packing, OCP's microscaling formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.weight_format import Layout, WeightFormat

FP8_TAG = "F8_E4M3"
"""The type of fp8 weights in the words of safetensors."""

Parts = Mapping[str, Tensor]
"""Tensors of one weight by their roles: values, scales, zeros, order, shape."""

_SMALL_TAGS = frozenset({"I8", FP8_TAG, "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"})
"""Types that no plain weight has."""

_OF_ROWS = (
    ".input_scale", ".input_zero_point", ".activation_scale", "_activation_scale", ".output_scale", ".k_scale",
    ".v_scale", ".q_scale", ".qscale_act",
)  # fmt: skip
"""Ends of the names of tensors that say how activations, keys and values were to be rounded."""

_ENDS: Mapping[Layout, tuple[str, str, Mapping[str, tuple[str, ...]]]] = {
    # Of a module's weight, or of a parameter of experts; two families call scales otherwise.
    "scaled": ("", "", {"scales": ("_scale", "_scale_inv", ".scale", ".qscale_weight"), "zeros": ("_zero_point",)}),
    "packed": (
        "_packed",
        "",
        {"scales": ("_scale",), "zeros": ("_zero_point",), "order": ("_g_idx",), "shape": ("_shape",)},
    ),
    "awq": ("qweight", "weight", {"scales": ("scales",), "zeros": ("qzeros",)}),
    "gptq": ("qweight", "weight", {"scales": ("scales",), "zeros": ("qzeros",), "order": ("g_idx",)}),
    "gptq_v2": ("qweight", "weight", {"scales": ("scales",), "zeros": ("qzeros",), "order": ("g_idx",)}),
    "mxfp4": ("_blocks", "", {"scales": ("_scales",)}),
}
"""Layout -> end of the name of a tensor of values, what the weight has in its place, and ends of others by their roles.

Of a role's ends the first counts that is there. One that begins with a dot is the module's. Types tell values that have
no end of their own.
"""


def parts_of(kind: WeightFormat, tags: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Each weight of a checkpoint -> the names of its tensors by their roles. A plain one has itself, in no role ("").

    tags: type of each tensor, in the words of safetensors. Raises UnsupportedModel for what the format cannot explain.
    """
    values_end, weight_end, ends_of = _ENDS[kind.layout]
    types = {FP8_TAG, "I8"} if kind.has_integers else {FP8_TAG}
    found: dict[str, dict[str, str]] = {}
    for name, tag in tags.items():
        if not (name.endswith(values_end) if values_end else tag in types):
            continue
        stem = name.removesuffix(values_end)
        parts = {"values": name}
        for role, ends in ends_of.items():
            names = [(stem.rpartition(".")[0] if end.startswith(".") else stem) + end for end in ends]
            present = next((one for one in names if one in tags), None)
            if present is not None:
                parts[role] = present
        if "scales" not in parts:
            raise UnsupportedModel(f"the base's checkpoint is damaged: {name} has no scales")
        found[stem + weight_end] = parts
    taken = {part for parts in found.values() for part in parts.values()}
    plain = {name: {"": name} for name in tags.keys() - taken if not name.endswith(_OF_ROWS)}
    for name in plain:
        if tags[name] in _SMALL_TAGS:
            raise UnsupportedModel(
                f"{name} of the base's checkpoint is kept as {tags[name]}, which {kind.method} does not explain"
            )
    return found | plain


def dequantise(kind: WeightFormat, parts: Parts) -> Tensor:
    """The weight in float32, in the shape that transformers loads: (out_dim, in_dim) of a linear module.

    Raises ValueError for scales that do not go with its values.
    """
    match kind.layout:
        case "scaled":
            return _scaled(parts, kind.block)
        case "packed":
            return _unpack_rows(parts)
        case "awq":
            return _unpack_awq(parts)
        case "gptq" | "gptq_v2":
            return _unpack_gptq(parts, kind.bits, 1 if kind.layout == "gptq" else 0)
        case "mxfp4":
            return _unpack_fp4(parts)


def row_scales(shape: Sequence[int], scales: Tensor) -> Tensor | None:
    """(out_dim,) float32: what the rows of an fp8 matrix of this shape are multiplied with.

    None where it is no matrix, or its rows have not one scale each.
    """
    if len(shape) != 2:
        return None
    if scales.numel() == 1:
        return _floats(scales).reshape(1).repeat(shape[0])
    return _floats(scales).flatten() if scales.shape in ((shape[0],), (shape[0], 1)) else None


def _scaled(parts: Parts, block: tuple[int, int] | None) -> Tensor:
    """Values times a scale a tensor, row, group of inputs or block."""
    wide = parts["values"].float()
    if "zeros" in parts:
        wide -= _spread(parts["zeros"].float(), wide, block)
    return wide * _spread(_floats(parts["scales"]), wide, block)


def _unpack_rows(parts: Parts) -> Tensor:
    """compressed-tensors' `pack-quantized`: integers less their middle, the lowest bits first, along the inputs."""
    out_dim, in_dim = parts["shape"].tolist()
    bits = 32 // -(-in_dim // parts["values"].shape[1])
    middle = 1 << (bits - 1)
    values = (_unpacked(parts["values"], bits)[:, :in_dim] - middle).float()
    scales = parts["scales"].float()
    group = _groups(in_dim, scales.shape[1], parts.get("order"), values.device)
    if "zeros" in parts:
        zeros = parts["zeros"]
        if zeros.dtype == torch.int32:
            zeros = _unpacked(zeros.t(), bits).t()[:out_dim] - middle
        values -= zeros.float()[:, group]
    weight: Tensor = values * scales[:, group]
    return weight


_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Place in its word of each of eight values."""


def _unpack_awq(parts: Parts) -> Tensor:
    """(in_dim, out_dim / 8) words, whose values are interleaved."""
    values: Tensor = _unpacked(parts["values"], 4, _AWQ_ORDER)
    group = _groups(len(values), len(parts["scales"]), None, values.device)
    if "zeros" in parts:
        values = values - _unpacked(parts["zeros"], 4, _AWQ_ORDER)[group]
    return (values.float() * parts["scales"].float()[group]).t()


def _unpack_gptq(parts: Parts, bits: int, less: int) -> Tensor:
    """(in_dim / 8, out_dim) words. The first layout keeps zero points less one."""
    values: Tensor = _unpacked(parts["values"].t(), bits).t()
    zeros = (_unpacked(parts["zeros"], bits) + less) & ((1 << bits) - 1)
    group = _groups(len(values), len(parts["scales"]), parts.get("order"), values.device)
    return ((values - zeros[group]).float() * parts["scales"].float()[group]).t()


_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _unpack_fp4(parts: Parts) -> Tensor:
    """Experts of gpt-oss: blocks of 32 inputs in 16 bytes, the low half first, and a power of two for each block.

    values: (num_experts, out_dim, in_dim / 32, 16). Returns (num_experts, in_dim, out_dim).
    """
    codes = parts["values"]
    table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], device=codes.device)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    powers = parts["scales"].int() - 127
    return torch.ldexp(table[pairs.int()], powers[..., None]).flatten(-2).transpose(-1, -2)


def _floats(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def _spread(scales: Tensor, wide: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Scales of blocks as one for each element of `wide`, (..., rows, columns); those of rows or of all as they are."""
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.dim() < wide.dim():
        scales = scales.reshape(*scales.shape, *(1 for _ in range(wide.dim() - scales.dim())))
    for dim in (-2, -1):
        size, count = wide.shape[dim], scales.shape[dim]
        if count > 1:
            # The last block may be cut short, where its size is known.
            length = block[dim] if block is not None and -(-size // block[dim]) == count else size // count
            if length * count < size:
                raise ValueError(f"{count} scales do not go with a side of {size}")
            scales = scales.repeat_interleave(length, dim).narrow(dim, 0, size)
    return scales


def _unpacked(words: Tensor, bits: int, places: list[int] | None = None) -> Tensor:
    """(rows, columns * 32 / bits) int32: unsigned integers of so many bits of (rows, columns) int32, the lowest first.

    places: where in its word each of a word's integers is.
    """
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    if places is not None:
        shifts = shifts[places]
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _groups(in_dim: int, num_groups: int, order: Tensor | None, device: torch.device) -> Tensor:
    """(in_dim,) int64: the group of each input; in order, where the checkpoint gives none."""
    if order is not None and bool((order >= 0).all()):
        return order.long()
    return torch.arange(in_dim, device=device) // -(-in_dim // num_groups)
