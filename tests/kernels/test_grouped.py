"""Products of few rows with many matrices, in Triton's interpreter or on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from lorafleet.kernels import grouped_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("counts", "num_more", "in_dim", "out_dim"),
    [((3, 0, 1, 2), 2, 64, 128), ((0, 40, 0), 0, 200, 72), ((17, 33, 1), 5, 32, 16)],
)
def test_each_row_is_multiplied_with_its_matrix(
    counts: tuple[int, ...], num_more: int, in_dim: int, out_dim: int, is_transposed: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (len(counts), out_dim, in_dim) if is_transposed else (len(counts), in_dim, out_dim)
    matrices = (torch.randn(shape, generator=generator) * in_dim**-0.5).to(DEVICE, dtype)
    matrices = matrices.transpose(1, 2) if is_transposed else matrices
    x = torch.randn(sum(counts) + num_more, in_dim, generator=generator).to(DEVICE, dtype)
    ends = torch.tensor(counts, dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    y = grouped_triton.product(x, matrices, ends)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
    wanted = torch.bmm(x[: sum(counts), None].double(), matrices.double()[owners])[:, 0]
    torch.testing.assert_close(y[: sum(counts)].double(), wanted, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])
