"""The Triton kernels of `fused`, which checks their arguments and documents them.

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
from lorafleet.kernels.kv_place import HeadNorm, KVPlace
from lorafleet.kernels.launching import launch
from lorafleet.kernels.tiling import dependent_launch

_BLOCK_HEADS = 8
_BLOCK_SILU = 1024
_FEW_ROWS = 256
_PLACES = ("row_pages", "row_offsets")
"""Views into a step's one array: where they start must not make another kernel of it."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scales: Tensor | None = None) -> Tensor:
    """One program a row."""
    return _rms_norm(x, weight, eps, residual, scales, None)


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scales: Tensor | None = None
) -> tuple[Tensor, Fp8Rows]:
    """One program a row."""
    rows = fp8_triton.empty(x.shape[0], x.shape[1], x.device)
    return _rms_norm(x, weight, eps, residual, scales, rows), rows


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scales: Tensor | None, fp8_rows: Fp8Rows | None
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, width = x.shape
    if num_rows:
        block = triton.next_power_of_2(width)
        pdl = dependent_launch(x)
        launch(_rms_norm_kernel, (num_rows,))(
            x,
            x if residual is None else residual,
            weight,
            out,
            scales,
            *_matrix(fp8_rows),
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            width,
            eps,
            HAS_RESIDUAL=residual is not None,
            LARGEST=LARGEST,
            BLOCK=block,
            PDL=pdl,
            num_warps=min(16, max(1, block // 512)),
            launch_pdl=pdl,
        )
    return out


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, place: KVPlace, norm: HeadNorm | None, scales: Tensor | None = None
) -> None:
    """One program takes a few heads of one kind (query, key or value) of one row."""
    num_rows = qkv.shape[0]
    _, num_kv_heads, _, head_dim = place.keys.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    block_heads = min(_BLOCK_HEADS, triton.next_power_of_2(num_heads))
    query_blocks, kv_blocks = triton.cdiv(num_heads, block_heads), triton.cdiv(num_kv_heads, block_heads)
    if not num_rows:
        return
    pdl = dependent_launch(qkv)
    launch(_rotate_and_store_kernel, (num_rows, query_blocks + 2 * kv_blocks))(
        qkv,
        cos,
        sin,
        place.keys,
        place.values,
        place.row_pages,
        place.row_offsets,
        qkv if norm is None else norm.query_weight,
        qkv if norm is None else norm.key_weight,
        scales,
        0.0 if norm is None else norm.eps,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        place.keys.stride(0),
        place.keys.stride(1),
        HAS_NORM=norm is not None,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        QUERY_BLOCKS=query_blocks,
        KV_BLOCKS=kv_blocks,
        BLOCK_HEADS=block_heads,
        HEAD_DIM=head_dim,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def store(key: Tensor, value: Tensor, place: KVPlace) -> None:
    """One program a row."""
    num_rows, num_kv_heads, head_dim = key.shape
    if not num_rows:
        return
    launch(_store_kernel, (num_rows,))(
        key,
        value,
        place.keys,
        place.values,
        place.row_pages,
        place.row_offsets,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        place.keys.stride(0),
        place.keys.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_HEADS=triton.next_power_of_2(num_kv_heads),
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


def silu_mul(gate_up: Tensor, scales: Tensor | None = None) -> Tensor:
    """One program takes a run of one row."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows and width:
        pdl = dependent_launch(gate_up)
        launch(_silu_mul_kernel, (num_rows, triton.cdiv(width, _BLOCK_SILU)))(
            gate_up, out, scales, None, None, gate_up.stride(0), width,
            LARGEST=LARGEST, BLOCK=_BLOCK_SILU, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return out


def silu_mul_fp8(gate_up: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Fp8Rows]:
    """One program a row, whose scale depends on all of it."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    rows = fp8_triton.empty(num_rows, width, gate_up.device)
    if num_rows and width:
        pdl = dependent_launch(gate_up)
        block = triton.next_power_of_2(width)
        # Few rows leave the GPU's other processors idle, so that each row takes all that one has.
        most_warps = 32 if num_rows <= _FEW_ROWS else 16
        launch(_silu_mul_kernel, (num_rows, 1))(
            gate_up, out, scales, *_matrix(rows), gate_up.stride(0), width,
            LARGEST=LARGEST, BLOCK=block, PDL=pdl, num_warps=min(most_warps, max(4, block // 512)), launch_pdl=pdl,
        )  # fmt: skip
    return out, rows


def _matrix(rows: Fp8Rows | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rows is None else (rows.values, rows.scales)


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    scales,
    fp8_values,
    fp8_scales,
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if scales is not None:
        values = (values.to(tl.float32) * tl.load(scales + row)).to(x.dtype.element_ty)
    if HAS_RESIDUAL:
        pointers = residual + row * residual_stride + columns
        before = tl.load(pointers, mask=inside, other=0.0)
        values = (before.to(tl.float32) + values.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(pointers, values, mask=inside)
    wide = values.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    # Rounded before the weight, as transformers does.
    normed = normed.to(x.dtype.element_ty).to(tl.float32) * scale.to(tl.float32)
    normed = normed.to(x.dtype.element_ty)
    tl.store(out + row * width + columns, normed, mask=inside)
    if fp8_values is not None:
        round_row(normed.to(tl.float32), fp8_values, fp8_scales, row, width, columns, inside, LARGEST)


@triton.jit(do_not_specialize_on_alignment=_PLACES)
def _rotate_and_store_kernel(
    qkv,
    cos,
    sin,
    keys,
    values,
    row_pages,
    row_offsets,
    query_weight,
    key_weight,
    scales,
    eps,
    qkv_stride,
    cos_stride,
    sin_stride,
    page_stride,
    head_stride,
    HAS_NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    KV_BLOCKS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype = qkv.dtype.element_ty
    dims = tl.arange(0, BLOCK_HALF)
    in_half = dims < HALF
    is_query = block < QUERY_BLOCKS
    is_value = block >= QUERY_BLOCKS + KV_BLOCKS
    # The block's first head among those of its kind, and how many heads of other kinds lie before it in the row.
    kind_block = tl.where(is_query, block, tl.where(is_value, block - QUERY_BLOCKS - KV_BLOCKS, block - QUERY_BLOCKS))
    kind_start = tl.where(is_query, 0, tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS))
    heads = kind_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    mask = (heads < tl.where(is_query, NUM_HEADS, NUM_KV_HEADS))[:, None] & in_half[None, :]
    source = qkv + row * qkv_stride + ((kind_start + heads) * HEAD_DIM)[:, None] + dims[None, :]
    low = tl.load(source, mask=mask, other=0.0)
    high = tl.load(source + HALF, mask=mask, other=0.0)
    if scales is not None:
        row_scale = tl.load(scales + row)
        low = (low.to(tl.float32) * row_scale).to(dtype)
        high = (high.to(tl.float32) * row_scale).to(dtype)
    if not is_value:
        if HAS_NORM:
            wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
            squares = tl.sum(wide_low * wide_low + wide_high * wide_high, 1)
            scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
            weight = query_weight if is_query else key_weight
            weight_low = tl.load(weight + dims, mask=in_half, other=0.0).to(tl.float32)[None, :]
            weight_high = tl.load(weight + HALF + dims, mask=in_half, other=0.0).to(tl.float32)[None, :]
            low = ((wide_low * scale).to(dtype).to(tl.float32) * weight_low).to(dtype)
            high = ((wide_high * scale).to(dtype).to(tl.float32) * weight_high).to(dtype)
        cos_low = tl.load(cos + row * cos_stride + dims, mask=in_half, other=0.0)[None, :]
        cos_high = tl.load(cos + row * cos_stride + HALF + dims, mask=in_half, other=0.0)[None, :]
        sin_low = tl.load(sin + row * sin_stride + dims, mask=in_half, other=0.0)[None, :]
        sin_high = tl.load(sin + row * sin_stride + HALF + dims, mask=in_half, other=0.0)[None, :]
        rotated = _rounded_product(low, cos_low) - _rounded_product(high, sin_low)
        high = (_rounded_product(high, cos_high) + _rounded_product(low, sin_high)).to(dtype)
        low = rotated.to(dtype)
    if is_query:
        tl.store(source, low, mask=mask)
        tl.store(source + HALF, high, mask=mask)
    else:
        cache = values if is_value else keys
        page = tl.load(row_pages + row).to(tl.int64)
        offset = tl.load(row_offsets + row)
        target = cache + page * page_stride + (heads * head_stride + offset * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(target, low, mask=mask)
        tl.store(target + HALF, high, mask=mask)


@triton.jit
def _rounded_product(a, b):
    """The product as torch rounds it, in float32."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=_PLACES)
def _store_kernel(
    key,
    value,
    keys,
    values,
    row_pages,
    row_offsets,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    page_stride,
    head_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (heads < NUM_KV_HEADS)[:, None] & (dims < HEAD_DIM)
    page = tl.load(row_pages + row).to(tl.int64)
    offset = tl.load(row_offsets + row)
    target = page * page_stride + (heads * head_stride + offset * HEAD_DIM)[:, None] + dims
    row_key = tl.load(key + row * key_stride + (heads * key_head_stride)[:, None] + dims, mask=mask)
    row_value = tl.load(value + row * value_stride + (heads * value_head_stride)[:, None] + dims, mask=mask)
    tl.store(keys + target, row_key, mask=mask)
    tl.store(values + target, row_value, mask=mask)


@triton.jit
def _silu_mul_kernel(
    gate_up,
    out,
    scales,
    fp8_values,
    fp8_scales,
    stride,
    width,
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
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    activated = (activated * up).to(out.dtype.element_ty)
    tl.store(out + row * width + columns, activated, mask=inside)
    if fp8_values is not None:
        round_row(activated.to(tl.float32), fp8_values, fp8_scales, row, width, columns, inside, LARGEST)
