"""The Triton kernel of `row_copy`, which checks its arguments and documents them: one program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorafleet.kernels.launching import launch
from lorafleet.kernels.weights import LOAD_ALIGN, ROW_ALIGN

_BLOCK = 2048
"""Elements that a program has on their way at once."""


def copy_rows(source: Tensor, pool: Tensor, moves: Tensor, *, is_aligned: bool) -> None:
    """`row_copy.place_rows`."""
    num_rows = moves.shape[1]
    if num_rows:
        launch(_copy_rows_kernel, (num_rows,))(
            source,
            pool,
            moves,
            moves.stride(0),
            ROW_ALIGN=ROW_ALIGN,
            SOURCE_ALIGN=LOAD_ALIGN if is_aligned else 1,
            BLOCK=_BLOCK,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["moves"])
def _copy_rows_kernel(
    source,
    pool,
    moves,
    table_stride,
    ROW_ALIGN: tl.constexpr,
    SOURCE_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = moves + tl.program_id(0)
    start = tl.multiple_of(tl.load(row), SOURCE_ALIGN)
    width = tl.multiple_of(tl.load(row + table_stride), SOURCE_ALIGN)
    place = tl.multiple_of(tl.load(row + 2 * table_stride), ROW_ALIGN)
    pitch = (width + ROW_ALIGN - 1) // ROW_ALIGN * ROW_ALIGN
    for first in range(0, pitch, BLOCK):
        i = first + tl.arange(0, BLOCK)
        values = tl.load(source + start + i, mask=i < width, other=0.0)
        tl.store(pool + place + i, values, mask=i < pitch)
