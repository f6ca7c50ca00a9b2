"""Rows to their places: the Triton kernel (interpreted where there is no GPU) and numpy's way, against a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lorafleet.kernels import row_copy_triton
from lorafleet.kernels.row_copy import place_rows
from lorafleet.kernels.weights import LOAD_ALIGN, ROW_ALIGN

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
WIDTHS = {
    "odd": (1, 3, 15, 16, 17, 100, 333, 333, 333, 2047, 2048, 2049, 5001),
    "aligned": (8, 8, 16, 24, 2048, 2056, 4096, 4096, 4096, 6000),
    "one": (37,),
    "narrow": (16,) * 40,
    "neighbours": (48,) * 9,
}
Place = Callable[[Tensor, Tensor, Tensor, bool], None]


def by_triton(source: Tensor, pool: Tensor, moves: Tensor, is_aligned: bool) -> None:
    """The kernel, on whichever device there is."""
    row_copy_triton.copy_rows(source, pool, moves, is_aligned=is_aligned)


def by_entry(source: Tensor, pool: Tensor, moves: Tensor, is_aligned: bool) -> None:
    """What the engine calls."""
    place_rows(source, pool, moves, is_aligned=is_aligned)


def apart(rng: np.random.Generator, widths: Sequence[int], *, step: int, in_order: bool) -> npt.NDArray[np.int64]:
    """(3, num_rows) rows that lie apart in both arrays by random multiples of `step`, or side by side and in order."""
    widths_ = np.array(widths, dtype=np.int64)
    pitches = -(-widths_ // ROW_ALIGN) * ROW_ALIGN
    if in_order:
        return np.stack([np.cumsum(widths_) - widths_, widths_, np.cumsum(pitches) - pitches])
    starts, places = np.empty_like(widths_), np.empty_like(widths_)
    for target, sizes, gap in ((starts, widths_, step), (places, pitches, ROW_ALIGN)):
        end = 0
        for row in rng.permutation(len(widths_)):
            target[row] = end + gap * int(rng.integers(0, 4))
            end = int(target[row] + sizes[row])
    return np.stack([starts, widths_, places])


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("in_order", [False, True], ids=["anywhere", "neighbours"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("place", [by_triton, by_entry])
@pytest.mark.slow
def test_rows_and_their_padding_are_written_and_nothing_else(
    place: Place, widths: str, in_order: bool, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(len(widths))
    is_aligned = not any(width % LOAD_ALIGN for width in WIDTHS[widths])
    rows = apart(rng, WIDTHS[widths], step=LOAD_ALIGN if is_aligned else 1, in_order=in_order)
    sizes = int((rows[0] + rows[1]).max()) + 3, int(rows[2].max()) + 8192
    source, pool = (torch.from_numpy(rng.integers(1, 1 << 14, size)).to(DEVICE, BITS[dtype]) for size in sizes)
    expected = pool.cpu().clone()
    for start, width, at in rows.T.tolist():
        expected[at : at + -(-width // ROW_ALIGN) * ROW_ALIGN] = 0
        expected[at : at + width] = source[start : start + width].cpu()
    # As a load gives them: columns of a longer table.
    table = torch.from_numpy(np.pad(rows, ((0, 0), (1, 2)))).to(DEVICE)
    place(source.view(dtype), pool.view(dtype), table[:, 1:-2], is_aligned)
    assert torch.equal(pool.cpu(), expected)


@pytest.mark.parametrize("place", [by_triton, by_entry])
def test_nothing_is_done_for_no_rows_and_rows_of_no_elements(place: Place) -> None:
    pool = torch.full((64,), 7.0, device=DEVICE)
    for num_rows in (0, 1, 2):
        place(pool[:1].clone(), pool, torch.zeros((3, num_rows), dtype=torch.int64, device=DEVICE), True)
    assert (pool == 7.0).all()


def test_beyond_what_32_bits_address(interpreter: None) -> None:
    """In an array that takes no memory where it is not written."""
    far = 1 << 31
    pool = torch.from_numpy(np.zeros(far + 512, dtype=np.int16)).view(torch.float16)
    pool[far : far + 24] = 3.0
    place_rows(pool, pool, torch.tensor([[far], [24], [far + 160]]))
    by_triton(pool, pool, torch.tensor([[far], [24], [far + 320]]), True)
    assert pool[far:].nonzero()[:, 0].tolist() == [first + i for first in (0, 160, 320) for i in range(24)]


@pytest.mark.parametrize(
    ("what", "source", "pool", "moves"),
    [
        ("source must be flat", torch.zeros(4, 4), torch.zeros(64), torch.zeros(3, 1).long()),
        ("pool must be flat", torch.zeros(16), torch.zeros(64)[::2], torch.zeros(3, 1).long()),
        ("source must be torch.float32", torch.zeros(16).half(), torch.zeros(64), torch.zeros(3, 1).long()),
        ("moves must be int64", torch.zeros(16), torch.zeros(64), torch.zeros(3, 1).int()),
        ("moves must be int64", torch.zeros(16), torch.zeros(64), torch.zeros(2, 1).long()),
        ("unit stride", torch.zeros(16), torch.zeros(64), torch.zeros(4, 3).long().t()),
        ("within the 16 elements of source", torch.zeros(16), torch.zeros(64), torch.tensor([[8], [9], [0]])),
        ("within the 16 elements of source", torch.zeros(16), torch.zeros(64), torch.tensor([[-1], [9], [0]])),
        ("multiples of 16 within the 64", torch.zeros(16), torch.zeros(64), torch.tensor([[0], [9], [8]])),
        ("multiples of 16 within the 64", torch.zeros(16), torch.zeros(64), torch.tensor([[0], [9], [64]])),
    ],
)
def test_wrong_arguments_are_refused(what: str, source: Tensor, pool: Tensor, moves: Tensor) -> None:
    with pytest.raises(ValueError, match=what):
        place_rows(source, pool, moves)
