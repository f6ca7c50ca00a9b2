"""The fused layer kernels and their torch twins against transformers' own modules and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4 import modeling_glm4 as glm4
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3 import modeling_phi3 as phi3

from lorafleet.kernels import fused, fused_triton, kv_place_triton
from lorafleet.kernels.kv_place import HeadNorm, KVPlace, Rotation
from lorafleet.kernels.norms import Activation, Branch, Norm, NormRule

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


NORMS: dict[str, tuple[Callable[[int], nn.Module], NormRule]] = {
    "llama": (lambda width: LlamaRMSNorm(width, eps=1e-5), NormRule(1e-5)),
    "gemma": (lambda width: Gemma3RMSNorm(width, eps=1e-6), NormRule(1e-6, offset=1.0, is_wide=True)),
    "olmo2": (lambda width: Olmo2RMSNorm(width, eps=1e-6), NormRule(1e-6, is_wide=True)),
    "cohere": (lambda width: CohereLayerNorm(width, eps=1e-5), NormRule(1e-5, is_wide=True, is_centred=True)),
}


def norm_of(kind: str, width: int, dtype: torch.dtype, seed: int = 1) -> tuple[nn.Module, Norm]:
    """Transformers' own with a random weight, and ours over the same weight."""
    make, rule = NORMS[kind]
    module = make(width).to(DEVICE, dtype)
    weight = module.get_parameter("weight")
    weight.copy_(randn(width, dtype=dtype, seed=seed))
    return module, Norm(weight, rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 40), (3, 1000)])
@pytest.mark.parametrize("kind", NORMS)
@torch.no_grad()
def test_norms_are_transformers(kind: str, rows: int, width: int, backend: str, dtype: torch.dtype) -> None:
    ours = fused_triton if backend == "triton" else fused
    module, norm = norm_of(kind, width, dtype)
    x = strided(randn(rows, width, dtype=dtype) + 0.5)
    before = x.clone()
    assert_near(ours.rms_norm(x, norm, None), module(x))
    residual = strided(randn(rows, width, dtype=dtype, seed=2))
    total = residual + x
    assert_near(ours.rms_norm(x, norm, residual), module(total))
    assert torch.equal(residual, total)
    assert torch.equal(x, before)
    ours.rms_norm(x, norm, None, out=x)
    assert_near(x, module(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", NORMS)
@torch.no_grad()
def test_a_branch_is_normed_and_scaled_on_its_way(kind: str, backend: str, dtype: torch.dtype) -> None:
    """As Gemma's layers do, and Granite's."""
    ours = fused_triton if backend == "triton" else fused
    own, norm = norm_of(kind, 40, dtype)
    own_after, after = norm_of("llama", 40, dtype, seed=4)
    x, residual = (randn(3, 40, dtype=dtype, seed=seed) for seed in (2, 3))
    for branch, y in ((Branch(norm), own(x)), (Branch(factor=0.22), x * 0.22), (Branch(norm, 0.5), own(x) * 0.5)):
        total, added = residual.clone(), residual.clone()
        normed = ours.rms_norm(x, after, total, None, branch)
        # Both norms may round another way.
        bound = 4 * ULPS[dtype]
        torch.testing.assert_close(total, residual + y, rtol=bound, atol=bound)
        assert_near(normed, own_after(total))
        ours.add(x, added, None, branch)
        assert torch.equal(added, total)


Shape = tuple[int, int, int, int]
"""Query heads, KV heads, elements of a head, tokens of a page."""
ROTATIONS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Rotation]] = {
    "whole": (llama.apply_rotary_pos_emb, Rotation(32)),
    "part": (phi3.apply_rotary_pos_emb, Rotation(20)),
    "neighbours": (cohere.apply_rotary_pos_emb, Rotation(32, is_interleaved=True, step=2)),
    "part, neighbours": (glm4.apply_rotary_pos_emb, Rotation(20, is_interleaved=True)),
    "wide table": (olmo2.apply_rotary_pos_emb, Rotation(32)),
    "half a table": (gpt_oss.apply_rotary_pos_emb, Rotation(32)),
    "none": (lambda query, key, *_: (query, key), Rotation(0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, None) for name in ROTATIONS), *zip(ROTATIONS, [*NORMS, *NORMS], strict=False)]
)
@torch.no_grad()
def test_rotations_are_transformers(name: str, kind: str | None, backend: str, dtype: torch.dtype) -> None:
    check_rotation(name, (4, 2, 32, 16), kind, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [None, "llama"])
@pytest.mark.parametrize("shape", [(4, 2, 64, 16), (7, 1, 80, 4), (12, 12, 32, 16), (2, 1, 96, 8)])
@torch.no_grad()
@pytest.mark.slow
def test_heads_of_any_shape(
    shape: tuple[int, int, int, int], kind: str | None, backend: str, dtype: torch.dtype
) -> None:
    check_rotation("whole", shape, kind, backend, dtype)


def check_rotation(name: str, shape: Shape, kind: str | None, backend: str, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim, page_tokens = shape
    apply, rotation = ROTATIONS[name]
    rotation = replace(rotation, width=head_dim) if name == "whole" else rotation
    rows, num_pages = 6, 5
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = strided(randn(rows, width, dtype=dtype))
    angles = randn(rows, max(2, rotation.width) // 2, dtype=torch.float32, seed=1).mul(9)
    if name != "half a table":
        angles = angles.repeat_interleave(2, dim=1) if rotation.step == 2 else angles.repeat(1, 2)
    cos, sin = (table if name == "wide table" else table.to(dtype) for table in (angles.cos(), angles.sin()))
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
    if kind is not None:
        (own_query, query_norm), (own_key, key_norm) = (norm_of(kind, head_dim, dtype, seed) for seed in (3, 4))
        query, key = own_query(query), own_key(key)
        norm = HeadNorm(query_norm, key_norm)
    query, key = (each.transpose(0, 1)[None] for each in (query, key))
    query, key = (each[0].transpose(0, 1) for each in apply(query, key, cos[None], sin[None]))

    if backend == "triton":
        kv_place_triton.rotate_and_store(qkv, (cos, sin), place, rotation, norm)
        rotated = qkv[:, : num_heads * head_dim].view(rows, num_heads, head_dim)
    else:
        rotated = fused.rotate_and_store(qkv, (cos, sin), place, rotation, norm)
    # Products that transformers rounds are not rounded in between neighbours.
    bound = (4 if rotation.is_interleaved else 1) * ULPS[dtype]
    pages, offsets = place.row_pages, place.row_offsets
    torch.testing.assert_close(rotated, query, rtol=bound, atol=bound)
    torch.testing.assert_close(place.keys[pages, :, offsets], key, rtol=bound, atol=bound)
    assert torch.equal(place.values[pages, :, offsets], value)
    assert cache.isfinite().sum() == 2 * rows * num_kv_heads * head_dim, "something else was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_store_writes_the_rows_places_alone(backend: str, dtype: torch.dtype) -> None:
    key, value = (randn(3, 5, 80, dtype=dtype, seed=seed).transpose(0, 1) for seed in range(2))
    cache = torch.full((2, 4, 3, 16, 80), float("nan"), dtype=dtype, device=DEVICE)
    pages = torch.tensor([3, 0, 0, 2, 3], dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([15, 0, 7, 8, 1], dtype=torch.int32, device=DEVICE)
    run: Callable[..., None] = kv_place_triton.store if backend == "triton" else fused.store
    run(key, value, KVPlace(cache[0], cache[1], pages, offsets))
    assert torch.equal(cache[0][pages, :, offsets], key)
    assert torch.equal(cache[1][pages, :, offsets], value)
    assert cache.isfinite().sum() == 2 * key.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (4, 1500)])
@pytest.mark.parametrize(
    ("activation", "own"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")]
)
@torch.no_grad()
def test_gates_are_transformers(
    activation: Activation, own: str, rows: int, width: int, backend: str, dtype: torch.dtype
) -> None:
    gate_up = strided(randn(rows, 2 * width, dtype=dtype).mul_(4))
    ours = fused_triton if backend == "triton" else fused
    expected, bound = ACT2FN[own](gate_up[:, :width]) * gate_up[:, width:], 8 * ULPS[dtype]
    torch.testing.assert_close(ours.gated(gate_up, activation), expected, rtol=bound, atol=bound)


def test_no_rows_are_fine() -> None:
    nothing, norm = torch.zeros(0, 8, device=DEVICE), Norm(torch.ones(8, device=DEVICE), NormRule(1e-6))
    assert fused_triton.rms_norm(nothing, norm, None).shape == (0, 8)
    assert fused_triton.gated(nothing, "silu").shape == (0, 4)


def _rows(num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.int32)


PLACE = KVPlace(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8), _rows(3), _rows(3))


def ones(width: int, dtype: torch.dtype = torch.float32) -> Norm:
    return Norm(torch.ones(width, dtype=dtype), NormRule(1e-6))


EIGHT = Rotation(8)


def rotate(qkv: Tensor, width: int, rotation: Rotation = EIGHT, norm: HeadNorm | None = None) -> Tensor:
    """With cos and sin of so many entries."""
    table = torch.zeros(qkv.shape[0], width)
    return fused.rotate_and_store(qkv, (table, table), PLACE, rotation, norm)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: fused.rms_norm(torch.zeros(2, 8), ones(9)), "weight must be a contiguous"),
        (lambda: fused.rms_norm(torch.zeros(2, 8), ones(8, torch.half)), "weight must be torch.float32"),
        (lambda: fused.rms_norm(torch.zeros(2, 8), ones(8), torch.zeros(3, 8)), "residual must have shape"),
        (lambda: fused.rms_norm(torch.zeros(2, 8).int(), ones(8)), "x must be torch.bfloat16"),
        (
            lambda: fused.add(torch.zeros(2, 8), torch.zeros(2, 8), None, Branch(ones(9))),
            "weight must be a contiguous",
        ),
        (lambda: fused.gated(torch.zeros(2, 7)), "of one width"),
        (lambda: fused.gated(torch.zeros(8, 2).t()), "unit stride"),
        (lambda: rotate(torch.zeros(2, 32), 8), r"qkv must have shape \(3, 32\)"),
        (lambda: rotate(torch.zeros(3, 16), 8), "hold no query"),
        (lambda: rotate(torch.zeros(3, 32), 8, Rotation(8, step=3)), "cos must have shape"),
        (lambda: rotate(torch.zeros(3, 32), 8, Rotation(10)), "an even number of a head's 8 elements"),
        (lambda: fused.rotate_and_store(torch.zeros(3, 32), None, PLACE, Rotation(8)), "must be given"),
        (
            lambda: rotate(torch.zeros(3, 32), 8, Rotation(8), HeadNorm(ones(8), Norm(torch.ones(8), NormRule(1e-5)))),
            "norms of one rule",
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
