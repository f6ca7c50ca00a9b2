"""The Triton kernels of `fp8`, which checks their arguments and documents them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lorafleet.kernels.fp8_values import DTYPE, LARGEST, Fp8Rows
from lorafleet.kernels.launching import launch
from lorafleet.kernels.tiling import dependent_launch

_BLOCK_RESCALE = 2048


def empty(num_rows: int, width: int, device: torch.device) -> Fp8Rows:
    """Return room for a matrix that a kernel is to write."""
    values = torch.empty((num_rows, width), dtype=DTYPE, device=device)
    return Fp8Rows(values, torch.empty(num_rows, dtype=torch.float32, device=device))


def quantise_rows(x: Tensor) -> Fp8Rows:
    """One program a row."""
    num_rows, width = x.shape
    out = empty(num_rows, width, x.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        pdl = dependent_launch(x)
        launch(_quantise_kernel, (num_rows,))(
            x,
            out.values,
            out.scales,
            x.stride(0),
            width,
            BLOCK=block,
            LARGEST=LARGEST,
            PDL=pdl,
            num_warps=min(16, max(1, block // 256)),
            launch_pdl=pdl,
        )
    return out


def rescale(
    y: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    of_outputs: Tensor | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """One program takes a run of one row."""
    num_rows, width = y.shape
    if num_rows and width:
        pdl = dependent_launch(y)
        launch(_rescale_kernel, (num_rows, triton.cdiv(width, _BLOCK_RESCALE)))(
            y, scales, bias, of_outputs, delta, y.stride(0), width,
            BLOCK=_BLOCK_RESCALE, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return y


@triton.jit
def power_of_two(largest, LARGEST: tl.constexpr):
    """Return the smallest powers of two by which float32 magnitudes can be divided to lie within LARGEST."""
    bits = tl.maximum(largest / LARGEST, 7.888609052210118e-31).to(tl.int32, bitcast=True)  # 2^-100
    # The next power of two: a mantissa that is not zero carries into the exponent. Infinity stays what it is.
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def round_row(wide, values, scales, row, width, columns, inside, LARGEST: tl.constexpr):
    """Write a row (float32, zero outside) as e4m3 values and its scale."""
    scale = power_of_two(tl.max(tl.abs(wide), 0), LARGEST)
    tl.store(values + row * width + columns, (wide * (1.0 / scale)).to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _quantise_kernel(x, values, scales, x_stride, width, BLOCK: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    round_row(wide, values, scales, row, width, columns, inside, LARGEST)


@triton.jit
def _rescale_kernel(y, scales, bias, of_outputs, delta, y_stride, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    pointers = y + row * y_stride + columns
    wide = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    wide *= tl.load(scales + row)
    if of_outputs is not None:
        wide *= tl.load(of_outputs + columns, mask=inside, other=0.0)
    if bias is not None:
        wide += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        wide += tl.load(delta + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, wide.to(y.dtype.element_ty), mask=inside)
