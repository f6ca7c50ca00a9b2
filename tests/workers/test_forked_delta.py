"""Projections whose adapters run beside the base's product, in a captured step, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lorafleet.kernels import fp8
from lorafleet.kernels.fp8_values import Fp8Weight
from lorafleet.kernels.segments import BASE_SLOT, build_segments
from lorafleet.workers.model import forked_delta
from lorafleet.workers.model.lora_context import LoraContext
from lorafleet.workers.model.lora_layers import FusedProjection
from tests.kernels.paged import paged_linear

IN_DIM, WIDTHS, RANKS = 512, (256, 64, 128), [[16, 8, 16], [4, 0, 4], [64, 64, 64]]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the largest output: roundings of the product, of the delta and of their sum."""


def test_nothing_forks_without_a_capture() -> None:
    assert not forked_delta.forks(torch.zeros(1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 7, 64, 256, 300])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, "fp8"], ids=str)
@torch.no_grad()
def test_replays_of_a_captured_projection(
    kind: torch.dtype | str, with_bias: bool, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in a row, so that the second one's fork meets the first one's memory; each replay has a batch of its own."""
    cuda = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.bfloat16 if isinstance(kind, str) else kind
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rng, context = np.random.default_rng(0), LoraContext()
    paged = paged_linear(rng, in_dim=IN_DIM, widths=WIDTHS, ranks=RANKS, dtype=dtype, device=cuda)
    linears: list[nn.Module] = []
    for width in WIDTHS:
        linear = nn.Linear(IN_DIM, width, bias=with_bias, device=cuda, dtype=dtype)
        linear.weight.copy_(randn(width, IN_DIM) / IN_DIM**0.5)
        linears.append(linear)
    names = tuple(f"m{i}" for i in range(len(WIDTHS)))
    layer = FusedProjection(names, linears, paged.weights, context, place="body", is_head=False)
    wide = layer.weight.double().cpu()
    if kind == "fp8":
        rounded: Fp8Weight = fp8.quantise_weight(layer.weight)
        layer.fp8_weight, wide = rounded, fp8.dequantise(rounded, torch.float64).cpu()
    forks: list[int] = []
    init = forked_delta.ForkedDelta.__init__

    def noting(self: forked_delta.ForkedDelta, x: torch.Tensor, *arguments: object) -> None:
        forks.append(len(x))
        init(self, x, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(forked_delta.ForkedDelta, "__init__", noting)
    xs = [torch.zeros(num_rows, IN_DIM, device=cuda, dtype=dtype) for _ in range(2)]
    segments = build_segments(np.zeros(num_rows, dtype=np.int32), device=cuda, max_chunks=num_rows)
    context.segments = segments
    for x in xs:
        layer(x)
    assert not forks
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [layer(x) for x in xs]
    assert forks == ([num_rows] * 2 if num_rows <= forked_delta.MOST_ROWS else [])
    bias = torch.zeros(()) if layer.bias is None else layer.bias.double().cpu()
    for _ in range(3):
        row_slots = rng.integers(BASE_SLOT, len(RANKS), num_rows).astype(np.int32)
        others = build_segments(row_slots, device=cuda, max_chunks=num_rows, chunk_length=segments.chunk_length)
        for name in ("permutation", "chunk_indptr", "chunk_slots", "row_slots"):
            getattr(segments, name).copy_(getattr(others, name))
        for x, y in zip(xs, outputs, strict=True):
            x.copy_(randn(num_rows, IN_DIM))
            y.fill_(float("nan"))
        graph.replay()
        for x, y in zip(xs, outputs, strict=True):
            read = x.double().cpu()
            if kind == "fp8":
                read = fp8.dequantise(fp8.quantise_rows(x), torch.float64).cpu()
            expected = read @ wide.t() + bias + paged.delta(x, row_slots)
            tolerance = TOLERANCE[dtype] * float(expected.abs().max())
            torch.testing.assert_close(y.double().cpu(), expected, rtol=0, atol=tolerance)
