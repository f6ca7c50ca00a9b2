"""The fused layer kernels and their torch twins against transformers' own modules and float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lorafleet.kernels import fused, fused_triton
from lorafleet.kernels.kv_place import HeadNorm, KVPlace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
ULPS = {torch.float32: 4e-7, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Two units in the last place: the order of a sum may round otherwise than the oracle's."""
BACKENDS = ["triton", "torch"]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def strided(matrix: Tensor) -> Tensor:
    """The same values, as columns of a wider matrix of NaN."""
    wide = torch.full((matrix.shape[0], matrix.shape[1] + 16), float("nan"), dtype=matrix.dtype, device=matrix.device)
    wide[:, 8:-8] = matrix
    return wide[:, 8:-8]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    bound = ULPS[actual.dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=bound, atol=bound, equal_nan=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 40), (3, 1000)])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@torch.no_grad()
def test_rms_norm_is_transformers(with_residual: bool, rows: int, width: int, backend: str, dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(width, eps=1e-5).to(DEVICE, dtype)
    module.weight.copy_(randn(width, dtype=dtype, seed=1))
    x = strided(randn(rows, width, dtype=dtype))
    residual = strided(randn(rows, width, dtype=dtype, seed=2)) if with_residual else None
    total = x if residual is None else residual + x
    before = x.clone()
    run: Callable[..., Tensor] = fused_triton.rms_norm if backend == "triton" else fused.rms_norm
    assert_near(run(x, module.weight, 1e-5, residual), module(total))
    assert torch.equal(x, before)
    if residual is not None:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "head_norm"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_tokens"),
    [(4, 2, 64, 16), (7, 1, 80, 4), (12, 12, 32, 16), (2, 1, 96, 8)],
)
@torch.no_grad()
@pytest.mark.slow
def test_rotate_and_store_is_transformers(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    with_norm: bool,
    backend: str,
    dtype: torch.dtype,
) -> None:
    rows, num_pages = 6, 5
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = strided(randn(rows, width, dtype=dtype))
    angles = randn(rows, head_dim // 2, dtype=torch.float32, seed=1).mul(9).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(num_pages * page_tokens, generator=torch.Generator().manual_seed(2))[:rows]
    cache = torch.full((2, num_pages, num_kv_heads, page_tokens, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    place = KVPlace(
        cache[0],
        cache[1],
        (slots // page_tokens).to(torch.int32).to(DEVICE),
        (slots % page_tokens).to(torch.int32).to(DEVICE),
    )
    heads = qkv.clone().view(rows, -1, head_dim)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    norm = None
    if with_norm:
        norms = [LlamaRMSNorm(head_dim, eps=1e-6).to(DEVICE, dtype) for _ in range(2)]
        for seed, module in enumerate(norms):
            module.weight.copy_(randn(head_dim, dtype=dtype, seed=3 + seed))
        query, key = norms[0](query), norms[1](key)
        norm = HeadNorm(norms[0].weight, norms[1].weight, 1e-6)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)

    if backend == "triton":
        fused_triton.rotate_and_store(qkv, cos, sin, place, norm)
        rotated = qkv[:, : num_heads * head_dim].view(rows, num_heads, head_dim)
    else:
        rotated = fused.rotate_and_store(qkv, cos, sin, place, norm)
    assert_near(rotated, query)
    pages, offsets = place.row_pages, place.row_offsets
    assert_near(place.keys[pages, :, offsets], key)
    assert torch.equal(place.values[pages, :, offsets], value)
    assert cache.isfinite().sum() == 2 * rows * num_kv_heads * head_dim, "something else was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_store_writes_the_rows_places_alone(backend: str, dtype: torch.dtype) -> None:
    key, value = (randn(3, 5, 80, dtype=dtype, seed=seed).transpose(0, 1) for seed in range(2))
    cache = torch.full((2, 4, 3, 16, 80), float("nan"), dtype=dtype, device=DEVICE)
    pages = torch.tensor([3, 0, 0, 2, 3], dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([15, 0, 7, 8, 1], dtype=torch.int32, device=DEVICE)
    run: Callable[..., None] = fused_triton.store if backend == "triton" else fused.store
    run(key, value, KVPlace(cache[0], cache[1], pages, offsets))
    assert torch.equal(cache[0][pages, :, offsets], key)
    assert torch.equal(cache[1][pages, :, offsets], value)
    assert cache.isfinite().sum() == 2 * key.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (4, 1500)])
@torch.no_grad()
def test_silu_mul_is_transformers(rows: int, width: int, backend: str, dtype: torch.dtype) -> None:
    gate_up = strided(randn(rows, 2 * width, dtype=dtype).mul_(4))
    run: Callable[[Tensor], Tensor] = fused_triton.silu_mul if backend == "triton" else fused.silu_mul
    assert_near(run(gate_up), ACT2FN["silu"](gate_up[:, :width]) * gate_up[:, width:])


def test_no_rows_are_fine() -> None:
    assert fused_triton.rms_norm(torch.zeros(0, 8, device=DEVICE), torch.ones(8, device=DEVICE), 1e-6, None).shape == (
        0,
        8,
    )
    assert fused_triton.silu_mul(torch.zeros(0, 8, device=DEVICE)).shape == (0, 4)


def _rows(num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.int32)


PLACE = KVPlace(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8), _rows(3), _rows(3))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: fused.rms_norm(torch.zeros(2, 8), torch.ones(9), 1e-6), "weight must be a contiguous"),
        (lambda: fused.rms_norm(torch.zeros(2, 8), torch.ones(8).half(), 1e-6), "weight must be torch.float32"),
        (lambda: fused.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6, torch.zeros(3, 8)), "residual must have shape"),
        (lambda: fused.rms_norm(torch.zeros(2, 8).int(), torch.ones(8), 1e-6), "x must be torch.bfloat16"),
        (lambda: fused.silu_mul(torch.zeros(2, 7)), "of one width"),
        (lambda: fused.silu_mul(torch.zeros(8, 2).t()), "unit stride"),
        (
            lambda: fused.rotate_and_store(torch.zeros(2, 32), torch.zeros(2, 8), torch.zeros(2, 8), PLACE),
            r"qkv must have shape \(3, 32\)",
        ),
        (
            lambda: fused.rotate_and_store(torch.zeros(3, 16), torch.zeros(3, 8), torch.zeros(3, 8), PLACE),
            "hold no query",
        ),
        (
            lambda: fused.rotate_and_store(torch.zeros(3, 32), torch.zeros(3, 4), torch.zeros(3, 8), PLACE),
            "cos must have shape",
        ),
        (lambda: fused.store(torch.zeros(3, 2, 8), torch.zeros(3, 1, 8), PLACE), "key must have shape"),
        (
            lambda: fused.store(
                torch.zeros(3, 1, 8),
                torch.zeros(3, 1, 8),
                KVPlace(PLACE.keys, PLACE.values, _rows(3).long(), _rows(3)),
            ),
            "row_pages must be a contiguous int32",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
