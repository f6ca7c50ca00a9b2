"""Rows and weights in 8-bit floating point (e4m3), and the product of them.

A row of activations has one scale, and a weight that is rounded here has one, all powers of two. So rounding to e4m3 is
the only error: scales never round, and a rounded weight is exact in bfloat16. Finer scales would gain nothing: e4m3 is
a floating-point format, with all its bits for what is larger than 1/32768 of the largest. Weights that were rounded
elsewhere may have a scale of any value for each output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafleet.kernels.fp8_values import DTYPE, LARGEST, Fp8Rows, Fp8Weight

ALIGNMENT = 16
"""The product takes dimensions that are multiples of this."""
FEW_ROWS = 1024
"""cuBLAS multiplies up to so many rows faster when they have no scale each, and more rows faster when they have."""


def fits(out_dim: int, in_dim: int) -> bool:
    """True if `product` takes a weight of this shape."""
    return out_dim % ALIGNMENT == 0 and in_dim % ALIGNMENT == 0


def quantise_rows(x: Tensor) -> Fp8Rows:
    """Round each row to e4m3, at the smallest power-of-two scale at which the row does not overflow.

    x: (rows, width), unit stride along width. A row that is not finite stays so. Raises ValueError.
    """
    check_rows("x", x)
    if x.is_cuda:
        from lorafleet.kernels import fp8_triton

        return fp8_triton.quantise_rows(x)
    scales = _power_of_two(x.abs().amax(-1).float())
    return Fp8Rows((x.float() / scales[:, None]).to(DTYPE), scales)


def largest_of(*matrices: Tensor) -> Tensor:
    """() float32, the largest magnitude in any of them."""
    return torch.stack([matrix.abs().amax().float() for matrix in matrices]).amax()


def quantise_weight(*matrices: Tensor, largest: Tensor | None = None) -> Fp8Weight:
    """Round matrices (out_dim, in_dim), one below the other, at one scale.

    largest: () float32, the largest magnitude that the scale is for; by default theirs.
    """
    scale = _power_of_two(largest_of(*matrices) if largest is None else largest)
    values = torch.cat([(matrix.float() / scale).to(DTYPE) for matrix in matrices])
    return Fp8Weight(values, scale.repeat(values.shape[0]))


def values_at(matrix: Tensor, scales: Tensor) -> Tensor:
    """Round (rows, width) at these scales, (rows,). What was dequantised with them gives its very values again.

    That holds in bfloat16, too: its rounding is far less than the distance of two values in fp8.
    """
    divisors = scales.float().clamp(min=2.0**-100)[:, None]
    return (matrix.float() / divisors).clamp_(-LARGEST, LARGEST).to(DTYPE)


def dequantise(rounded: Fp8Rows | Fp8Weight, dtype: torch.dtype) -> Tensor:
    """Return the matrix in `dtype`."""
    return (rounded.values.to(torch.promote_types(dtype, torch.float32)) * rounded.scales[:, None]).to(dtype)


def product(x: Fp8Rows, weight: Fp8Weight, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Compute x.values @ weight^T in bfloat16, on a GPU of compute capability 8.9 or later.

    Returns (rows, out_dim) and, for up to FEW_ROWS rows of a weight of one scale, the scales (rows,) that the output is
    still to be multiplied with before `bias` (out_dim,) bfloat16 is added. The kernel that reads the output does that
    in passing. Otherwise the scales are None: those of rows and outputs, and the bias, are applied. Raises ValueError.
    """
    if x.values.shape[1] != weight.values.shape[1] or not fits(*weight.values.shape):
        raise ValueError(
            f"rows of {x.values.shape[1]} do not go with a weight of {tuple(weight.values.shape)}: the inner dimension "
            f"must be the same, and both dimensions multiples of {ALIGNMENT}"
        )
    are_few = x.values.shape[0] <= FEW_ROWS
    y = torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=_one(x.values.device) if are_few else x.scales[:, None],
        scale_b=(weight.scales[0] if weight.is_uniform else _one(x.values.device)) if are_few else weight.scales[None],
        bias=None if are_few else bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if are_few and not weight.is_uniform:
        return rescale(y, x.scales, bias, weight.scales), None
    return y, x.scales if are_few else None


def rescale(
    y: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    of_outputs: Tensor | None = None,
    *,
    delta: Tensor | None = None,
) -> Tensor:
    """Compute y = y * scales[:, None] * of_outputs + bias + delta in place; return y.

    y: (rows, out_dim), unit stride along out_dim. scales: (rows,) float32. bias: (out_dim,). of_outputs: (out_dim,)
    float32. delta: (rows, out_dim), contiguous. Raises ValueError.
    """
    check_rows("y", y)
    if delta is not None and (delta.shape != y.shape or not delta.is_contiguous()):
        raise ValueError(f"delta must be a contiguous {tuple(y.shape)}, got {tuple(delta.shape)}")
    check_scales(scales, y)
    if of_outputs is not None:
        check_scales(of_outputs, y.t())
    if y.is_cuda:
        from lorafleet.kernels import fp8_triton

        return fp8_triton.rescale(y, scales, bias, of_outputs, delta)
    wide = scaled(y, scales)
    if of_outputs is not None:
        wide *= of_outputs
    for term in (bias, delta):
        if term is not None:
            wide = wide + term
    return y.copy_(wide)


def scaled(y: Tensor, scales: Tensor | None) -> Tensor:
    """Return y * scales[:, None] in float32; y itself without scales."""
    return y if scales is None else y.float() * scales[:, None]


def _power_of_two(largest: Tensor) -> Tensor:
    """Return the smallest powers of two by which float32 magnitudes can be divided to lie within e4m3's range."""
    mantissa, exponent = torch.frexp((largest / LARGEST).clamp(min=2.0**-100))
    # 2^e for a mantissa in (0.5, 1), 2^(e - 1) for one of 0.5: the power of two itself.
    scales = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
    return torch.where(torch.isfinite(largest), scales, largest)


def check_rows(name: str, matrix: Tensor) -> None:
    """Raise ValueError unless `matrix` is two-dimensional with unit stride along its last dimension."""
    if matrix.dim() != 2 or matrix.stride(1) != 1:
        raise ValueError(
            f"{name} must be a matrix with unit stride along its last dimension, got shape {tuple(matrix.shape)} and "
            f"strides {matrix.stride()}"
        )


def check_scales(scales: Tensor, y: Tensor) -> None:
    """Raise ValueError unless `scales` belong to the rows of `y`."""
    if scales.shape != y.shape[:1] or scales.stride() != (1,) or scales.dtype != torch.float32:
        raise ValueError(
            f"scales must be a contiguous float32 ({y.shape[0]},), got {scales.dtype} {tuple(scales.shape)}"
        )
    if scales.device != y.device:
        raise ValueError(f"scales must be on {y.device}, got {scales.device}")


_ones: dict[torch.device, Tensor] = {}


def _one(device: torch.device) -> Tensor:
    if device not in _ones:
        _ones[device] = torch.ones((), device=device)
    return _ones[device]
