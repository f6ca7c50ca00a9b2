"""Operations between a decoder layer's products, one launch each: residual and norms, rotary and KV write, gate and up.

Entry points: CUDA runs the kernels of `fused_triton` and `kv_place_triton`. Other devices run the plain torch here,
which is also the kernels' oracle. All round where transformers' modules round, or less, so that a layer keeps its
values. Nothing synchronises.

`scales`: (rows,) float32, what a product of fp8 rows is still to be multiplied with; it is rounded after that. The
functions ending in `_fp8` also return their output in fp8, for the next product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.kernels import fp8
from lorafleet.kernels.fp8_values import Fp8Rows
from lorafleet.kernels.kv_place import HeadNorm, KVPlace, Rotation, check_scales
from lorafleet.kernels.norms import PLAIN, Activation, Branch, Norm, NormRule

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    branch: Branch = PLAIN,
    out: Tensor | None = None,
) -> Tensor:
    """Compute `norm` of x, or of the residual with x added.

    x: (rows, width), rows may be strided. norm.weight: (width,) in x's dtype. With `residual` (rows, width), what
    `branch` makes of x is added to it in place first, and the sum is what is normalised. Returns `out`, (rows, width),
    which may be x. Raises ValueError.
    """
    _check_norm(x, norm, residual, scales, branch)
    if x.is_cuda:
        from lorafleet.kernels import fused_triton

        return fused_triton.rms_norm(x, norm, residual, scales, branch, out)
    x = _rounded(x, scales)
    if residual is not None:
        x = residual.add_(_through(branch, x))
    y = _normalise(x, norm.weight, norm.rule)
    return y if out is None else out.copy_(y)


def rms_norm_fp8(
    x: Tensor, norm: Norm, residual: Tensor | None = None, scales: Tensor | None = None, branch: Branch = PLAIN
) -> tuple[Tensor, Fp8Rows]:
    """Compute `rms_norm`, and its output in fp8."""
    if x.is_cuda:
        from lorafleet.kernels import fused_triton

        _check_norm(x, norm, residual, scales, branch)
        return fused_triton.rms_norm_fp8(x, norm, residual, scales, branch)
    y = rms_norm(x, norm, residual, scales, branch)
    return y, fp8.quantise_rows(y)


def add(x: Tensor, residual: Tensor, scales: Tensor | None = None, branch: Branch = PLAIN) -> None:
    """Add what `branch` makes of x to the residual in place. Arguments as in `rms_norm`."""
    _check_norm(x, None, residual, scales, branch)
    if x.is_cuda:
        from lorafleet.kernels import fused_triton

        fused_triton.add(x, residual, scales, branch)
        return
    residual.add_(_through(branch, _rounded(x, scales)))


def rotate_and_store(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    place: KVPlace,
    rotation: Rotation,
    norm: HeadNorm | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Rotate the queries in place, and write the rotated keys and the values to their pages.

    qkv: (rows, (num_heads + 2 num_kv_heads) * head_dim): query heads, then key heads, then value heads. Rows may be
    strided. angles: cos and sin, (rows, at least rotation.num_angles) in qkv's dtype, or in float32 if it is
    rotated in that; None without rotation. Returns a view of the queries, (rows, num_heads, head_dim). Raises
    ValueError.
    """
    num_kv_heads, head_dim = place.keys.shape[1], place.keys.shape[3]
    num_heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads
    _check_rows("qkv", qkv, (place.row_pages.shape[0], (num_heads + 2 * num_kv_heads) * head_dim), _like(place))
    if num_heads <= 0:
        raise ValueError(f"rows of {qkv.shape[-1]} elements hold no query beside {num_kv_heads} KV heads of {head_dim}")
    _check_place(place, qkv.shape[0])
    _check_rotation(qkv, angles, rotation, head_dim)
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norm is not None:
        for name, each in (("query", norm.query), ("key", norm.key)):
            _check_vector(f"the {name}'s weight", each.weight, query)
        if norm.query.rule != norm.key.rule:
            raise ValueError(f"query and key must have norms of one rule, got {norm.query.rule} and {norm.key.rule}")
    if scales is not None:
        fp8.check_scales(scales, qkv)
        if not qkv.is_cuda:
            fp8.rescale(qkv, scales)
    if qkv.is_cuda:
        from lorafleet.kernels import kv_place_triton

        kv_place_triton.rotate_and_store(qkv, angles, place, rotation, norm, scales)
        return query
    if norm is not None:
        key = _normalise(key, norm.key.weight, norm.key.rule)
        query.copy_(_normalise(query, norm.query.weight, norm.query.rule))
    if rotation.width and angles is not None:
        key = _rotate(key, angles, rotation)
        query.copy_(_rotate(query, angles, rotation))
    _write(key, place.keys, place.key_scales, place)
    _write(value, place.values, place.value_scales, place)
    return query


def store(key: Tensor, value: Tensor, place: KVPlace) -> None:
    """Write keys and values to their pages as they are, or rounded to fp8 where the place has scales.

    key, value: (rows, num_kv_heads, head_dim), unit stride along head_dim. Raises ValueError.
    """
    shape = (place.row_pages.shape[0], place.keys.shape[1], place.keys.shape[3])
    _check_place(place, shape[0])
    for name, tensor in (("key", key), ("value", value)):
        _check_rows(name, tensor, shape, _like(place))
    if key.is_cuda:
        from lorafleet.kernels import kv_place_triton

        kv_place_triton.store(key, value, place)
        return
    _write(key, place.keys, place.key_scales, place)
    _write(value, place.values, place.value_scales, place)


def _write(rows: Tensor, cache: Tensor, scales: Tensor | None, place: KVPlace) -> None:
    """rows: (rows, num_kv_heads, head_dim)."""
    if scales is None:
        cache[place.row_pages, :, place.row_offsets] = rows
        return
    rounded = fp8.quantise_rows(rows.reshape(-1, rows.shape[2]))
    # As bytes, which torch can index.
    cache.view(torch.uint8)[place.row_pages, :, place.row_offsets] = rounded.values.view(torch.uint8).view(rows.shape)
    scales[place.row_pages, :, place.row_offsets] = rounded.scales.view(rows.shape[:2])


def _like(place: KVPlace) -> Tensor | None:
    """The cache, if rows must be of its dtype."""
    return place.keys if place.key_scales is None else None


def gated(gate_up: Tensor, activation: Activation = "silu", scales: Tensor | None = None) -> Tensor:
    """Compute activation(gate) * up.

    gate_up: (rows, 2 * width), gate before up; rows may be strided. Returns (rows, width). Raises ValueError.
    """
    _check_gate_up(gate_up, scales)
    if gate_up.is_cuda:
        from lorafleet.kernels import fused_triton

        return fused_triton.gated(gate_up, activation, scales)
    gate, up = _rounded(gate_up, scales).chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)


def gated_fp8(gate_up: Tensor, activation: Activation = "silu", scales: Tensor | None = None) -> tuple[Tensor, Fp8Rows]:
    """Compute `gated`, and its output in fp8."""
    if gate_up.is_cuda:
        from lorafleet.kernels import fused_triton

        _check_gate_up(gate_up, scales)
        return fused_triton.gated_fp8(gate_up, activation, scales)
    y = gated(gate_up, activation, scales)
    return y, fp8.quantise_rows(y)


def _rounded(x: Tensor, scales: Tensor | None) -> Tensor:
    return fp8.scaled(x, scales).to(x.dtype)


def _through(branch: Branch, x: Tensor) -> Tensor:
    if branch.norm is not None:
        x = _normalise(x, branch.norm.weight, branch.norm.rule)
    return x if branch.factor == 1.0 else x * branch.factor


def _normalise(x: Tensor, weight: Tensor, rule: NormRule) -> Tensor:
    wide = x.float()
    if rule.is_centred:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(rule.eps))
    if not rule.is_wide:
        return wide.to(x.dtype).mul_(weight + rule.offset if rule.offset else weight)
    return wide.mul_(weight.float() + rule.offset).to(x.dtype)


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor], rotation: Rotation) -> Tensor:
    """x: (rows, heads, head_dim)."""
    rotated, rest = x[..., : rotation.width], x[..., rotation.width :]
    cos, sin = (table[:, None, : rotation.num_angles : rotation.step] for table in angles)
    if rotation.is_interleaved:
        low, high = rotated.float().reshape(*rotated.shape[:-1], -1, 2).unbind(-1)
        cos, sin = cos.float(), sin.float()
        pairs = torch.stack((low * cos - high * sin, high * cos + low * sin), dim=-1)
        turned = pairs.flatten(-2).to(x.dtype)
    else:
        low, high = rotated.chunk(2, dim=-1)
        turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _check_norm(x: Tensor, norm: Norm | None, residual: Tensor | None, scales: Tensor | None, branch: Branch) -> None:
    _check_rows("x", x, x.shape)
    for each in (norm, branch.norm):
        if each is not None:
            _check_vector("weight", each.weight, x)
    if residual is not None:
        _check_rows("residual", residual, x.shape, x)
    if scales is not None:
        fp8.check_scales(scales, x)


def _check_rotation(qkv: Tensor, angles: tuple[Tensor, Tensor] | None, rotation: Rotation, head_dim: int) -> None:
    if rotation.width % 2 or not 0 <= rotation.width <= head_dim:
        raise ValueError(f"an even number of a head's {head_dim} elements can be rotated, got {rotation.width}")
    if rotation.width == 0:
        return
    if angles is None:
        raise ValueError("cos and sin must be given to rotate")
    for name, tensor in zip(("cos", "sin"), angles, strict=True):
        like = tensor if tensor.dtype == torch.float32 and tensor.device == qkv.device else qkv
        _check_rows(name, tensor, (qkv.shape[0], max(rotation.num_angles, tensor.shape[-1])), like)


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
    for name, scales in (("key_scales", place.key_scales), ("value_scales", place.value_scales)):
        check_scales(name, scales, keys)
    for name, rows in (("row_pages", place.row_pages), ("row_offsets", place.row_offsets)):
        if rows.shape != (num_rows,) or rows.stride() != (1,) or rows.dtype != torch.int32:
            raise ValueError(f"{name} must be a contiguous int32 ({num_rows},), got {rows.dtype} {tuple(rows.shape)}")
        if rows.device != keys.device:
            raise ValueError(f"{name} must be on {keys.device}, got {rows.device}")
