"""Operations between a decoder layer's products, one launch each: residual and norm, rotary and KV write, SiLU and up.

Entry points: CUDA runs the Triton kernels of `fused_triton`, other devices the plain torch here, which is also their
oracle. All round where transformers' Llama modules round, so that a layer keeps its values. Nothing synchronises.

`scales`: (rows,) float32, what a product of fp8 rows is still to be multiplied with; it is rounded after that. The
functions ending in `_fp8` also return their output in fp8, for the next product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.kernels import fp8
from lorafleet.kernels.fp8_values import Fp8Rows
from lorafleet.kernels.kv_place import HeadNorm, KVPlace

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """Compute weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32, rounded before the weight.

    x: (rows, width), rows may be strided. weight: (width,) in x's dtype. With `residual` (rows, width), x is added to
    it in place first, and the sum is what is normalised. Returns (rows, width). Raises ValueError.
    """
    _check_norm(x, weight, residual, scales)
    if x.is_cuda:
        from lorafleet.kernels import fused_triton

        return fused_triton.rms_norm(x, weight, eps, residual, scales)
    x = _rounded(x, scales)
    if residual is not None:
        x = residual.add_(x)
    return _normalise(x, weight, eps)


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Fp8Rows]:
    """Compute `rms_norm`, and its output in fp8."""
    if x.is_cuda:
        from lorafleet.kernels import fused_triton

        _check_norm(x, weight, residual, scales)
        return fused_triton.rms_norm_fp8(x, weight, eps, residual, scales)
    y = rms_norm(x, weight, eps, residual, scales)
    return y, fp8.quantise_rows(y)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: KVPlace,
    norm: HeadNorm | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Rotate the queries in place, and write the rotated keys and the values to their pages.

    qkv: (rows, (num_heads + 2 num_kv_heads) * head_dim): query heads, then key heads, then value heads. Rows may be
    strided. cos, sin: (rows, head_dim) in qkv's dtype, halves rotated against each other. Returns a view of the
    queries, (rows, num_heads, head_dim). Raises ValueError.
    """
    num_kv_heads, head_dim = place.keys.shape[1], place.keys.shape[3]
    num_heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads
    _check_rows("qkv", qkv, (place.row_pages.shape[0], (num_heads + 2 * num_kv_heads) * head_dim), place.keys)
    if num_heads <= 0:
        raise ValueError(f"rows of {qkv.shape[-1]} elements hold no query beside {num_kv_heads} KV heads of {head_dim}")
    _check_place(place, qkv.shape[0])
    if head_dim % 2:
        raise ValueError(f"head_dim must be even to be rotated, got {head_dim}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        _check_rows(name, tensor, (qkv.shape[0], head_dim), qkv)
    if norm is not None:
        for name, weight in (("query_weight", norm.query_weight), ("key_weight", norm.key_weight)):
            _check_vector(name, weight, cos)
    if scales is not None:
        fp8.check_scales(scales, qkv)
        if not qkv.is_cuda:
            fp8.rescale(qkv, scales)
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if qkv.is_cuda:
        from lorafleet.kernels import fused_triton

        fused_triton.rotate_and_store(qkv, cos, sin, place, norm, scales)
        return query
    if norm is not None:
        key = _normalise(key, norm.key_weight, norm.eps)
        query.copy_(_normalise(query, norm.query_weight, norm.eps))
    query.copy_(_rotate(query, cos, sin))
    place.keys[place.row_pages, :, place.row_offsets] = _rotate(key, cos, sin)
    place.values[place.row_pages, :, place.row_offsets] = value
    return query


def store(key: Tensor, value: Tensor, place: KVPlace) -> None:
    """Write keys and values to their pages as they are.

    key, value: (rows, num_kv_heads, head_dim), unit stride along head_dim. Raises ValueError.
    """
    shape = (place.row_pages.shape[0], place.keys.shape[1], place.keys.shape[3])
    _check_place(place, shape[0])
    for name, tensor in (("key", key), ("value", value)):
        _check_rows(name, tensor, shape, place.keys)
    if key.is_cuda:
        from lorafleet.kernels import fused_triton

        fused_triton.store(key, value, place)
        return
    place.keys[place.row_pages, :, place.row_offsets] = key
    place.values[place.row_pages, :, place.row_offsets] = value


def silu_mul(gate_up: Tensor, scales: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up.

    gate_up: (rows, 2 * width), gate before up; rows may be strided. Returns (rows, width). Raises ValueError.
    """
    _check_gate_up(gate_up, scales)
    if gate_up.is_cuda:
        from lorafleet.kernels import fused_triton

        return fused_triton.silu_mul(gate_up, scales)
    gate, up = _rounded(gate_up, scales).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_mul_fp8(gate_up: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Fp8Rows]:
    """Compute `silu_mul`, and its output in fp8."""
    if gate_up.is_cuda:
        from lorafleet.kernels import fused_triton

        _check_gate_up(gate_up, scales)
        return fused_triton.silu_mul_fp8(gate_up, scales)
    y = silu_mul(gate_up, scales)
    return y, fp8.quantise_rows(y)


def _rounded(x: Tensor, scales: Tensor | None) -> Tensor:
    return fp8.scaled(x, scales).to(x.dtype)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype).mul_(weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (rows, heads, head_dim)."""
    low, high = x.chunk(2, dim=-1)
    return (x * cos[:, None]).add_(torch.cat((-high, low), dim=-1).mul_(sin[:, None]))


def _check_norm(x: Tensor, weight: Tensor, residual: Tensor | None, scales: Tensor | None) -> None:
    _check_rows("x", x, x.shape)
    _check_vector("weight", weight, x)
    if residual is not None:
        _check_rows("residual", residual, x.shape, x)
    if scales is not None:
        fp8.check_scales(scales, x)


def _check_gate_up(gate_up: Tensor, scales: Tensor | None) -> None:
    _check_rows("gate_up", gate_up, gate_up.shape)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must be of one width, got {gate_up.shape[-1]} for both together")
    if scales is not None:
        fp8.check_scales(scales, gate_up)


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    if tensor.shape != shape or tensor.dim() < 2:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride along its last dimension, got strides {tensor.stride()}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be {', '.join(map(str, _DTYPES))}, got {tensor.dtype}")
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}")


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    if vector.shape != x.shape[-1:] or vector.stride() != (1,):
        raise ValueError(f"{name} must be a contiguous ({x.shape[-1]},), got {tuple(vector.shape)}")
    if vector.dtype != x.dtype or vector.device != x.device:
        raise ValueError(f"{name} must be {x.dtype} on {x.device}, got {vector.dtype} on {vector.device}")


def _check_place(place: KVPlace, num_rows: int) -> None:
    keys, values = place.keys, place.values
    if keys.shape != values.shape or keys.stride() != values.stride() or keys.dtype != values.dtype:
        raise ValueError(
            f"keys and values must be alike, got {tuple(keys.shape)} {keys.dtype} "
            f"and {tuple(values.shape)} {values.dtype}"
        )
    if keys.stride()[2:] != (keys.shape[3], 1):
        raise ValueError(f"the tokens of a page must be contiguous, got strides {keys.stride()}")
    for name, rows in (("row_pages", place.row_pages), ("row_offsets", place.row_offsets)):
        if rows.shape != (num_rows,) or rows.stride() != (1,) or rows.dtype != torch.int32:
            raise ValueError(f"{name} must be a contiguous int32 ({num_rows},), got {rows.dtype} {tuple(rows.shape)}")
        if rows.device != keys.device:
            raise ValueError(f"{name} must be on {keys.device}, got {rows.device}")
