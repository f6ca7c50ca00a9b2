"""The Triton kernels of `fused` that write rows: norms and gates. `fused` checks their arguments and documents them.

With `PDL` a kernel starts while the one ahead of it still runs. It waits for that one's end before it reads any data
that others write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lorafleet.kernels import fp8_triton
from lorafleet.kernels.fp8_triton import round_row
from lorafleet.kernels.fp8_values import LARGEST, Fp8Rows
from lorafleet.kernels.launching import launch
from lorafleet.kernels.norms import NO_RULE, PLAIN, Activation, Branch, Norm
from lorafleet.kernels.tiling import dependent_launch

_BLOCK_GATED = 1024
_FEW_ROWS = 256


def rms_norm(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    scales: Tensor | None = None,
    branch: Branch = PLAIN,
    out: Tensor | None = None,
) -> Tensor:
    """One program a row."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _join(x, norm, residual, scales, branch, out, None)
    return out


def rms_norm_fp8(
    x: Tensor, norm: Norm, residual: Tensor | None, scales: Tensor | None = None, branch: Branch = PLAIN
) -> tuple[Tensor, Fp8Rows]:
    """One program a row."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = fp8_triton.empty(x.shape[0], x.shape[1], x.device)
    _join(x, norm, residual, scales, branch, out, rows)
    return out, rows


def add(x: Tensor, residual: Tensor, scales: Tensor | None, branch: Branch) -> None:
    """One program a row."""
    _join(x, None, residual, scales, branch, None, None)


def _join(
    x: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    scales: Tensor | None,
    branch: Branch,
    out: Tensor | None,
    fp8_rows: Fp8Rows | None,
) -> None:
    num_rows, width = x.shape
    if not num_rows:
        return
    block = triton.next_power_of_2(width)
    pdl = dependent_launch(x)
    rule = NO_RULE if norm is None else norm.rule
    ahead = NO_RULE if branch.norm is None else branch.norm.rule
    launch(_rms_norm_kernel, (num_rows,))(
        x,
        x if residual is None else residual,
        None if norm is None else norm.weight,
        None if branch.norm is None else branch.norm.weight,
        out,
        scales,
        *_matrix(fp8_rows),
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        x.stride(0) if out is None else out.stride(0),
        width,
        rule.eps,
        ahead.eps,
        branch.factor,
        HAS_RESIDUAL=residual is not None,
        HAS_FACTOR=branch.factor != 1.0,
        OFFSET=rule.offset,
        IS_WIDE=rule.is_wide,
        IS_CENTRED=rule.is_centred,
        BRANCH_OFFSET=ahead.offset,
        BRANCH_IS_WIDE=ahead.is_wide,
        BRANCH_IS_CENTRED=ahead.is_centred,
        LARGEST=LARGEST,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(16, max(1, block // 512)),
        launch_pdl=pdl,
    )


def gated(gate_up: Tensor, activation: Activation, scales: Tensor | None = None) -> Tensor:
    """One program takes a run of one row."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows and width:
        pdl = dependent_launch(gate_up)
        launch(_gated_kernel, (num_rows, triton.cdiv(width, _BLOCK_GATED)))(
            gate_up, out, scales, None, None, gate_up.stride(0), width, ACTIVATION=activation,
            LARGEST=LARGEST, BLOCK=_BLOCK_GATED, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return out


def gated_fp8(gate_up: Tensor, activation: Activation, scales: Tensor | None = None) -> tuple[Tensor, Fp8Rows]:
    """One program a row, whose scale depends on all of it."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    rows = fp8_triton.empty(num_rows, width, gate_up.device)
    if num_rows and width:
        pdl = dependent_launch(gate_up)
        block = triton.next_power_of_2(width)
        # Few rows leave the GPU's other processors idle, so that each row takes all that one has.
        most_warps = 32 if num_rows <= _FEW_ROWS else 16
        launch(_gated_kernel, (num_rows, 1))(
            gate_up, out, scales, *_matrix(rows), gate_up.stride(0), width, ACTIVATION=activation,
            LARGEST=LARGEST, BLOCK=block, PDL=pdl, num_warps=min(most_warps, max(4, block // 512)), launch_pdl=pdl,
        )  # fmt: skip
    return out, rows


def _matrix(rows: Fp8Rows | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rows is None else (rows.values, rows.scales)


@triton.jit
def normed(values, weight, inside, width, eps, OFFSET: tl.constexpr, IS_WIDE: tl.constexpr, IS_CENTRED: tl.constexpr):
    """The norm of one row, `values` with zeros outside, in their dtype."""
    wide = values.to(tl.float32)
    if IS_CENTRED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / width, 0.0)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    if not IS_WIDE:
        # Rounded before the weight, as most of transformers' do.
        wide = wide.to(values.dtype).to(tl.float32)
    return (wide * (weight.to(tl.float32) + OFFSET)).to(values.dtype)


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    branch_weight,
    out,
    scales,
    fp8_values,
    fp8_scales,
    x_stride,
    residual_stride,
    out_stride,
    width,
    eps,
    branch_eps,
    factor,
    HAS_RESIDUAL: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    OFFSET: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    BRANCH_OFFSET: tl.constexpr,
    BRANCH_IS_WIDE: tl.constexpr,
    BRANCH_IS_CENTRED: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if weight is not None:
        scale = tl.load(weight + columns, mask=inside, other=0.0)
    if branch_weight is not None:
        branch_scale = tl.load(branch_weight + columns, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if scales is not None:
        values = (values.to(tl.float32) * tl.load(scales + row)).to(x.dtype.element_ty)
    if branch_weight is not None:
        values = normed(
            values, branch_scale, inside, width, branch_eps, BRANCH_OFFSET, BRANCH_IS_WIDE, BRANCH_IS_CENTRED
        )
    if HAS_FACTOR:
        values = (values.to(tl.float32) * factor).to(x.dtype.element_ty)
    if HAS_RESIDUAL:
        pointers = residual + row * residual_stride + columns
        before = tl.load(pointers, mask=inside, other=0.0)
        values = (before.to(tl.float32) + values.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(pointers, values, mask=inside)
    if weight is not None:
        values = normed(values, scale, inside, width, eps, OFFSET, IS_WIDE, IS_CENTRED)
        tl.store(out + row * out_stride + columns, values, mask=inside)
        if fp8_values is not None:
            round_row(values.to(tl.float32), fp8_values, fp8_scales, row, width, columns, inside, LARGEST)


@triton.jit
def _gated_kernel(
    gate_up,
    out,
    scales,
    fp8_values,
    fp8_scales,
    stride,
    width,
    ACTIVATION: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    if scales is not None:
        scale = tl.load(scales + row)
        gate = (gate * scale).to(out.dtype.element_ty).to(tl.float32)
        up = (up * scale).to(out.dtype.element_ty).to(tl.float32)
    if ACTIVATION == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # tanh by the logistic function, whose exponential never overflows to what is no number.
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        activated = gate / (1.0 + tl.exp(-inner))
    activated = activated.to(out.dtype.element_ty).to(tl.float32)
    activated = (activated * up).to(out.dtype.element_ty)
    tl.store(out + row * width + columns, activated, mask=inside)
    if fp8_values is not None:
        round_row(activated.to(tl.float32), fp8_values, fp8_scales, row, width, columns, inside, LARGEST)
