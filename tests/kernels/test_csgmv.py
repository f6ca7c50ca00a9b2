"""The Triton kernels against float64: on the CPU in Triton's interpreter, on a GPU when there is one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafleet.kernels.embedding_triton import lookup
from lorafleet.kernels.expand_triton import expand
from lorafleet.kernels.segments import BASE_SLOT, IntArray, Segments, build_segments
from lorafleet.kernels.shrink_triton import shrink
from lorafleet.kernels.tiling import ExpandTiling, ShrinkTiling
from lorafleet.kernels.weights import LoraEmbeddingWeights, LoraWeights
from lorafleet.workers.step.layout import GRAPH_CHUNK_LENGTH, most_chunks
from tests.kernels.paged import POPULARITY, PagedLinear, paged_embedding, paged_linear

GPU_ROWS = (1, 2, 3, 7, 16, 33, 133, 1000, 2049)
MIXED_RANKS = ((8, 8, 8), (1, 0, 3), (64, 64, 70), (0, 0, 0), (16, 5, 0), (0, 2, 2), (130, 1, 16))
SMALL_RANKS = ((4, 4), (1, 0), (20, 9), (0, 0), (16, 0), (0, 2))
# Per element (rtol, atol), and of the norm. fp16 at the bar that csgmv kernels are commonly held to; bf16 rounds h too.
TOLERANCES = {
    torch.float32: (1e-4, 1e-4, 1e-6),
    torch.float16: (1e-3, 1e-3, 5e-4),
    torch.bfloat16: (1.6e-2, 4e-2, 5e-3),
}


def _assert_near(actual: Tensor, expected: Tensor) -> None:
    rtol, atol, of_norm = TOLERANCES[actual.dtype]
    actual, expected = actual.double().cpu(), expected.double().cpu()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    assert (actual - expected).norm() <= of_norm * expected.norm()


def _same_bits(one: Tensor, other: Tensor, weights: LoraWeights | LoraEmbeddingWeights, segments: Segments) -> bool:
    """Whether two h agree to the bit wherever they are specified: rows of adapters, below each slice's rank."""
    slots = segments.row_slots[segments.permutation.long()]
    ranks = torch.where((slots >= 0)[:, None], weights.ranks[slots.long().clamp(min=0)], 0)
    specified = torch.arange(one.shape[3], device=one.device) < ranks[:, :, None]
    return all(torch.equal(a[specified], b[specified]) for a, b in zip(one, other, strict=True))


def _check_both_forms(
    linear: PagedLinear,
    row_slots: IntArray,
    segments: Segments,
    shrink_tiling: ShrinkTiling | None = None,
    expand_tiling: ExpandTiling | None = None,
) -> None:
    weights = linear.weights
    device, dtype, rows, out_dim = weights.pool.device, weights.pool.dtype, len(row_slots), weights.out_dim
    x = torch.randn(rows, weights.in_dim + 8).to(device, dtype)[:, : weights.in_dim]
    base = torch.randn(rows, out_dim).to(device, dtype)
    bias = torch.randn(out_dim).to(device, dtype)
    delta, touched = linear.delta(x, row_slots), linear.touched(row_slots)

    h = shrink(x, weights, segments, shrink_tiling)
    assert _same_bits(h, shrink(x, weights, segments, shrink_tiling), weights, segments)
    wide = torch.full((rows, out_dim + 16), float("nan"), device=device, dtype=dtype)
    y = wide[:, 8 : out_dim + 8]
    y.copy_(base)
    expand(h, weights, segments, y, tiling=expand_tiling)
    _assert_near(y, base.double().cpu() + delta)
    assert torch.equal(y.cpu()[~touched], base.cpu()[~touched])
    again = base.clone()
    expand(h, weights, segments, again, tiling=expand_tiling)
    assert torch.equal(y, again)
    assert wide[:, [*range(8), *range(out_dim + 8, out_dim + 16)]].isnan().all()

    for written_bias in (None, bias):
        y = torch.full((rows, out_dim), float("nan"), device=device, dtype=dtype)
        expand(h, weights, segments, y, accumulate=False, bias=written_bias, tiling=expand_tiling)
        expected = delta if written_bias is None else delta + bias.double().cpu()
        _assert_near(y, expected)
        assert torch.equal(y.double().cpu()[~touched], expected[~touched])
        again = torch.empty_like(y)
        expand(h, weights, segments, again, accumulate=False, bias=written_bias, tiling=expand_tiling)
        assert torch.equal(y, again)

        # Powers of two, as those of fp8 rows: they round nothing.
        scales = torch.exp2(torch.randint(-3, 4, (rows,)).float()).to(device)
        scaled = base.double().cpu() * scales.double().cpu()[:, None]
        y = base.clone()
        expand(h, weights, segments, y, bias=written_bias, scales=scales, tiling=expand_tiling)
        _assert_near(y, scaled + expected)


INTERPRETER_TILINGS = {
    "few": (ShrinkTiling(16, 16, 32, 4, 2), ExpandTiling(16, 32, 1024, 64, True, 4, 2)),
    "many": (ShrinkTiling(64, 16, 32, 4, 2), ExpandTiling(64, 32, 1024, 32, False, 4, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tiling", INTERPRETER_TILINGS)
@pytest.mark.parametrize(
    ("rows", "popularity"), [(1, "identical"), pytest.param(7, "base", marks=pytest.mark.slow), (19, "zipf")]
)
def test_interpreted(interpreter: None, rows: int, popularity: str, tiling: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(rows)
    cpu = torch.device("cpu")
    linear = paged_linear(rng, in_dim=72, widths=(70, 24), ranks=SMALL_RANKS, dtype=dtype, device=cpu)
    row_slots = POPULARITY[popularity](rng, rows, len(SMALL_RANKS)).astype(np.int32)
    chunk_length = 16 if tiling == "few" else 64
    segments = build_segments(row_slots, device=cpu, chunk_length=chunk_length)
    _check_both_forms(linear, row_slots, segments, *INTERPRETER_TILINGS[tiling])


@pytest.mark.parametrize("popularity", ["identical", "distinct", "skewed", "only_base"])
@pytest.mark.slow
def test_interpreted_with_fewer_chunks_than_captured(interpreter: None, popularity: str) -> None:
    """As a graph replays: the chunks that the mix does not need cover no rows."""
    rng = np.random.default_rng(11)
    cpu = torch.device("cpu")
    linear = paged_linear(rng, in_dim=40, widths=(48, 24), ranks=SMALL_RANKS, dtype=torch.float32, device=cpu)
    row_slots = POPULARITY[popularity](rng, 21, len(SMALL_RANKS)).astype(np.int32)
    max_chunks = most_chunks(len(row_slots), len(SMALL_RANKS))
    segments = build_segments(row_slots, device=cpu, chunk_length=GRAPH_CHUNK_LENGTH, max_chunks=max_chunks)
    assert segments.num_chunks < segments.max_chunks
    _check_both_forms(linear, row_slots, segments, *INTERPRETER_TILINGS["few"])


@pytest.mark.slow
def test_interpreted_ranks_beyond_a_block_in_parts(interpreter: None) -> None:
    rng = np.random.default_rng(5)
    cpu = torch.device("cpu")
    linear = paged_linear(
        rng, in_dim=20, widths=(50,), ranks=[[137], [3]], dtype=torch.float32, device=cpu, max_part=32
    )
    row_slots = np.array([0, 1, BASE_SLOT, 0, 0], dtype=np.int32)
    for tilings in INTERPRETER_TILINGS.values():
        segments = build_segments(row_slots, device=cpu, chunk_length=tilings[0].block_rows)
        _check_both_forms(linear, row_slots, segments, *tilings)


def _check_embedding(rng: np.random.Generator, row_slots: IntArray, dtype: torch.dtype, device: torch.device) -> None:
    embedding = paged_embedding(
        rng, num_embeddings=203, width=70, ranks=[8, 0, 3, 16], page_elements=320, dtype=dtype, device=device
    )
    rows = len(row_slots)
    tokens = torch.from_numpy(rng.integers(0, 203, rows)).to(device)
    segments = build_segments(row_slots, device=device)
    base = torch.randn(rows, 70).to(device, dtype)
    y, again = base.clone(), base.clone()
    h = lookup(tokens, embedding.weights, segments)
    assert _same_bits(h, lookup(tokens, embedding.weights, segments), embedding.weights, segments)
    for out in (y, again):
        expand(h, embedding.weights, segments, out)
    assert torch.equal(y, again)
    _assert_near(y, base.double().cpu() + embedding.delta(tokens, row_slots))
    base_rows = torch.from_numpy(row_slots < 0)
    assert torch.equal(y.cpu()[base_rows], base.cpu()[base_rows])


def test_interpreted_embedding(interpreter: None) -> None:
    rng = np.random.default_rng(9)
    row_slots = POPULARITY["base"](rng, 13, 4).astype(np.int32)
    _check_embedding(rng, row_slots, torch.float32, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("rows", [1, 33, 2049])
def test_embedding_matches_float64(cuda: torch.device, rows: int, popularity: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(rows)
    _check_embedding(rng, POPULARITY[popularity](rng, rows, 4).astype(np.int32), dtype, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("rows", GPU_ROWS)
def test_matches_float64(cuda: torch.device, rows: int, popularity: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(rows)
    linear = paged_linear(rng, in_dim=264, widths=(520, 135, 72), ranks=MIXED_RANKS, dtype=dtype, device=cuda)
    row_slots = POPULARITY[popularity](rng, rows, len(MIXED_RANKS)).astype(np.int32)
    _check_both_forms(linear, row_slots, build_segments(row_slots, device=cuda))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_length", [16, 32, 64, 128])
@pytest.mark.parametrize("max_rank", [1, 8, 64, 512])
@pytest.mark.parametrize("widths", [(4096,), (1024, 1024, 128, 7), (4864, 4864)], ids=str)
def test_geometries(cuda: torch.device, widths: Sequence[int], max_rank: int, chunk_length: int) -> None:
    rng = np.random.default_rng(max_rank)
    ranks = [[int(rng.integers(0, max_rank + 1)) for _ in widths] for _ in range(5)] + [[max_rank] * len(widths)]
    linear = paged_linear(rng, in_dim=896, widths=widths, ranks=ranks, dtype=torch.bfloat16, device=cuda)
    row_slots = POPULARITY["base"](rng, 300, 6).astype(np.int32)
    _check_both_forms(linear, row_slots, build_segments(row_slots, device=cuda, chunk_length=chunk_length))


@pytest.mark.gpu
def test_many_slots(cuda: torch.device) -> None:
    rng = np.random.default_rng(6)
    ranks = [[int(rank)] for rank in rng.integers(1, 9, 1024)]
    linear = paged_linear(rng, in_dim=128, widths=(128,), ranks=ranks, dtype=torch.bfloat16, device=cuda)
    row_slots = rng.permutation(1024).astype(np.int32)
    _check_both_forms(linear, row_slots, build_segments(row_slots, device=cuda))


def _check_widths_apart(widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Outputs that differ in width alone, as a hidden size and a vocabulary do, one after the other and back."""
    rng = np.random.default_rng(7)
    row_slots = np.array([0, 1, 0], dtype=np.int32)
    segments = build_segments(row_slots, device=device)
    linears = [
        paged_linear(rng, in_dim=64, widths=(width,), ranks=[[8], [8]], dtype=dtype, device=device) for width in widths
    ]
    for linear in (*linears, *reversed(linears)):
        _check_both_forms(linear, row_slots, segments)


@pytest.mark.gpu
def test_widths_do_not_share_a_compiled_kernel(cuda: torch.device) -> None:
    _check_widths_apart((4096, 32000), torch.bfloat16, cuda)


@pytest.mark.slow
def test_interpreted_widths_apart(interpreter: None) -> None:
    _check_widths_apart((64, 304, 80), torch.float32, torch.device("cpu"))


@pytest.mark.gpu
def test_a_graph_replays_with_another_mix(cuda: torch.device) -> None:
    rng = np.random.default_rng(8)
    rows = 48
    linear = paged_linear(rng, in_dim=256, widths=(256, 128), ranks=SMALL_RANKS, dtype=torch.bfloat16, device=cuda)
    x = torch.randn(rows, 256, device=cuda, dtype=torch.bfloat16)
    y = torch.empty(rows, 384, device=cuda, dtype=torch.bfloat16)
    chunks = {"chunk_length": GRAPH_CHUNK_LENGTH, "max_chunks": most_chunks(rows, len(SMALL_RANKS))}
    captured = build_segments(np.zeros(rows, dtype=np.int32), device=cuda, **chunks)

    def run() -> None:
        expand(shrink(x, linear.weights, captured), linear.weights, captured, y, accumulate=False)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for popularity, patterns in POPULARITY.items():
        row_slots = patterns(rng, rows, len(SMALL_RANKS)).astype(np.int32)
        replayed = build_segments(row_slots, device=cuda, **chunks)
        for name in ("row_slots", "permutation", "chunk_indptr", "chunk_slots"):
            getattr(captured, name).copy_(getattr(replayed, name))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert y.isfinite().all(), popularity
        _assert_near(y, linear.delta(x, row_slots))
