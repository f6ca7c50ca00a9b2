"""The Triton kernels of `fused` that write keys and values to their places. `fused` checks and documents them.

With `PDL` a kernel starts while the one ahead of it still runs. It waits for that one's end before it reads any data
that others write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lorafleet.kernels.fp8_triton import power_of_two
from lorafleet.kernels.fp8_values import LARGEST
from lorafleet.kernels.kv_place import HeadNorm, KVPlace, Rotation
from lorafleet.kernels.launching import launch
from lorafleet.kernels.norms import NO_RULE
from lorafleet.kernels.tiling import dependent_launch

_BLOCK_HEADS = 8
_PLACES = ("row_pages", "row_offsets")
"""Views into a step's one array: where they start must not make another kernel of it."""


def rotate_and_store(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    place: KVPlace,
    rotation: Rotation,
    norm: HeadNorm | None,
    scales: Tensor | None = None,
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
    is_rotated = rotation.width > 0 and angles is not None
    cos, sin = angles if is_rotated and angles is not None else (qkv, qkv)
    width = rotation.width if is_rotated else head_dim
    rule = NO_RULE if norm is None else norm.query.rule
    launch(_rotate_and_store_kernel, (num_rows, query_blocks + 2 * kv_blocks))(
        qkv,
        cos,
        sin,
        place.keys,
        place.values,
        place.key_scales,
        place.value_scales,
        place.row_pages,
        place.row_offsets,
        qkv if norm is None else norm.query.weight,
        qkv if norm is None else norm.key.weight,
        scales,
        rule.eps,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        place.keys.stride(0),
        place.keys.stride(1),
        HAS_NORM=norm is not None,
        OFFSET=rule.offset,
        IS_WIDE=rule.is_wide,
        IS_CENTRED=rule.is_centred,
        IS_ROTATED=is_rotated,
        IS_INTERLEAVED=is_rotated and rotation.is_interleaved,
        STEP=rotation.step,
        LARGEST=LARGEST,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        QUERY_BLOCKS=query_blocks,
        KV_BLOCKS=kv_blocks,
        BLOCK_HEADS=block_heads,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_HALF=triton.next_power_of_2(width // 2),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - width)),
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
        place.key_scales,
        place.value_scales,
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
        LARGEST=LARGEST,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=_PLACES)
def _rotate_and_store_kernel(
    qkv,
    cos,
    sin,
    keys,
    values,
    key_scales,
    value_scales,
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
    OFFSET: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    IS_ROTATED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
    LARGEST: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    KV_BLOCKS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """A head is `low` and `high`, the elements of its pairs, and the rest behind the first WIDTH."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    HALF: tl.constexpr = WIDTH // 2
    SPREAD: tl.constexpr = 2 if IS_INTERLEAVED else 1
    APART: tl.constexpr = 1 if IS_INTERLEAVED else HALF
    HAS_REST: tl.constexpr = WIDTH < HEAD_DIM
    dtype = qkv.dtype.element_ty
    dims = tl.arange(0, BLOCK_HALF)
    in_half = dims < HALF
    rest_dims = WIDTH + tl.arange(0, BLOCK_REST)
    in_rest = rest_dims < HEAD_DIM
    is_query = block < QUERY_BLOCKS
    is_value = block >= QUERY_BLOCKS + KV_BLOCKS
    # The block's first head among those of its kind, and how many heads of other kinds lie before it in the row.
    kind_block = tl.where(is_query, block, tl.where(is_value, block - QUERY_BLOCKS - KV_BLOCKS, block - QUERY_BLOCKS))
    kind_start = tl.where(is_query, 0, tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS))
    heads = kind_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    has_head = (heads < tl.where(is_query, NUM_HEADS, NUM_KV_HEADS))[:, None]
    mask, rest_mask = has_head & in_half[None, :], has_head & in_rest[None, :]
    start = qkv + row * qkv_stride + ((kind_start + heads) * HEAD_DIM)[:, None]
    source = start + (dims * SPREAD)[None, :]
    low = tl.load(source, mask=mask, other=0.0)
    high = tl.load(source + APART, mask=mask, other=0.0)
    if HAS_REST:
        rest = tl.load(start + rest_dims[None, :], mask=rest_mask, other=0.0)
    if scales is not None:
        row_scale = tl.load(scales + row)
        low = (low.to(tl.float32) * row_scale).to(dtype)
        high = (high.to(tl.float32) * row_scale).to(dtype)
        if HAS_REST:
            rest = (rest.to(tl.float32) * row_scale).to(dtype)
    if not is_value:
        if HAS_NORM:
            wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
            if IS_CENTRED:
                total = tl.sum(wide_low + wide_high, 1)
                if HAS_REST:
                    total += tl.sum(rest.to(tl.float32), 1)
                mean = (total / HEAD_DIM)[:, None]
                wide_low = tl.where(mask, wide_low - mean, 0.0)
                wide_high = tl.where(mask, wide_high - mean, 0.0)
            squares = tl.sum(wide_low * wide_low + wide_high * wide_high, 1)
            if HAS_REST:
                wide_rest = rest.to(tl.float32)
                if IS_CENTRED:
                    wide_rest = tl.where(rest_mask, wide_rest - mean, 0.0)
                squares += tl.sum(wide_rest * wide_rest, 1)
            scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
            weight = query_weight if is_query else key_weight
            weight_low = tl.load(weight + dims * SPREAD, mask=in_half, other=0.0).to(tl.float32)[None, :]
            weight_high = tl.load(weight + dims * SPREAD + APART, mask=in_half, other=0.0).to(tl.float32)[None, :]
            low = _weighted(wide_low * scale, weight_low + OFFSET, dtype, IS_WIDE)
            high = _weighted(wide_high * scale, weight_high + OFFSET, dtype, IS_WIDE)
            if HAS_REST:
                weight_rest = tl.load(weight + rest_dims, mask=in_rest, other=0.0).to(tl.float32)[None, :]
                rest = _weighted(wide_rest * scale, weight_rest + OFFSET, dtype, IS_WIDE)
        if IS_ROTATED:
            cosines = tl.load(cos + row * cos_stride + dims * STEP, mask=in_half, other=0.0)[None, :]
            sines = tl.load(sin + row * sin_stride + dims * STEP, mask=in_half, other=0.0)[None, :]
            if IS_INTERLEAVED:
                wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
                cosines, sines = cosines.to(tl.float32), sines.to(tl.float32)
                low = (wide_low * cosines - wide_high * sines).to(dtype)
                high = (wide_high * cosines + wide_low * sines).to(dtype)
            else:
                rotated = _rounded_product(low, cosines) - _rounded_product(high, sines)
                high = (_rounded_product(high, cosines) + _rounded_product(low, sines)).to(dtype)
                low = rotated.to(dtype)
    if is_query:
        tl.store(source, low, mask=mask)
        tl.store(source + APART, high, mask=mask)
        if (HAS_REST and HAS_NORM) or (HAS_REST and scales is not None):
            tl.store(start + rest_dims[None, :], rest, mask=rest_mask)
    else:
        cache = values if is_value else keys
        page = tl.load(row_pages + row).to(tl.int64)
        offset = tl.load(row_offsets + row)
        lines = page * page_stride + heads * head_stride + offset * HEAD_DIM
        target = cache + lines[:, None]
        pairs = target + (dims * SPREAD)[None, :]
        if key_scales is None:
            tl.store(pairs, low, mask=mask)
            tl.store(pairs + APART, high, mask=mask)
            if HAS_REST:
                tl.store(target + rest_dims[None, :], rest, mask=rest_mask)
        else:
            largest = tl.maximum(_largest(low), _largest(high))
            if HAS_REST:
                largest = tl.maximum(largest, _largest(rest))
            head_scales = power_of_two(largest, LARGEST)
            kind: tl.constexpr = keys.dtype.element_ty
            tl.store(pairs, _divided(low, head_scales, kind), mask=mask)
            tl.store(pairs + APART, _divided(high, head_scales, kind), mask=mask)
            if HAS_REST:
                tl.store(target + rest_dims[None, :], _divided(rest, head_scales, kind), mask=rest_mask)
            line_scales = value_scales if is_value else key_scales
            tl.store(line_scales + lines // HEAD_DIM, head_scales, mask=heads < NUM_KV_HEADS)


@triton.jit
def _largest(rows):
    """(heads,) float32: the largest magnitude of each."""
    return tl.max(tl.abs(rows.to(tl.float32)), 1)


@triton.jit
def _divided(rows, scales, kind: tl.constexpr):
    """Return heads divided by their scales, in fp8."""
    return (rows.to(tl.float32) / scales[:, None]).to(kind)


@triton.jit
def _weighted(wide, weight, dtype: tl.constexpr, IS_WIDE: tl.constexpr):
    if not IS_WIDE:
        wide = wide.to(dtype).to(tl.float32)
    return (wide * weight).to(dtype)


@triton.jit
def _rounded_product(a, b):
    """The product as torch rounds it, in float32: not at all if b is wide."""
    product = a.to(tl.float32) * b.to(tl.float32)
    return product if b.dtype == tl.float32 else product.to(a.dtype).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=_PLACES)
def _store_kernel(
    key,
    value,
    keys,
    values,
    key_scales,
    value_scales,
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
    LARGEST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (heads < NUM_KV_HEADS)[:, None] & (dims < HEAD_DIM)
    page = tl.load(row_pages + row).to(tl.int64)
    offset = tl.load(row_offsets + row)
    lines = page * page_stride + heads * head_stride + offset * HEAD_DIM
    row_key = tl.load(key + row * key_stride + (heads * key_head_stride)[:, None] + dims, mask=mask, other=0.0)
    row_value = tl.load(value + row * value_stride + (heads * value_head_stride)[:, None] + dims, mask=mask, other=0.0)
    _store_heads(row_key, keys, key_scales, lines, dims, mask, heads < NUM_KV_HEADS, LARGEST, HEAD_DIM)
    _store_heads(row_value, values, value_scales, lines, dims, mask, heads < NUM_KV_HEADS, LARGEST, HEAD_DIM)


@triton.jit
def _store_heads(
    rows, cache, scales, lines, dims, mask, is_head, LARGEST: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Write the heads of one token, (heads, dims), rounded to fp8 where the cache has scales."""
    if scales is None:
        tl.store(cache + lines[:, None] + dims, rows, mask=mask)
    else:
        head_scales = power_of_two(_largest(rows), LARGEST)
        tl.store(cache + lines[:, None] + dims, _divided(rows, head_scales, cache.dtype.element_ty), mask=mask)
        tl.store(scales + lines // HEAD_DIM, head_scales, mask=is_head)
