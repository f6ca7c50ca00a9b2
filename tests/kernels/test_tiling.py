"""Which tiling a launch takes: the shipped tables, what they reach, and the rule beyond them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lorafleet.kernels import tiling
from lorafleet.kernels.tiling import ExpandTiling, Shape, ShrinkTiling, nearest, power_of_two, read_table

TABLES = sorted((Path(tiling.__file__).parent / "tuned").glob("*.json"))


def _shape(
    width: int = 4096,
    max_rank: int = 16,
    chunk_length: int = 16,
    max_chunks: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Shape:
    return Shape(1, width, max_rank, chunk_length, max_chunks, dtype, torch.device("cpu"))


def _check(found: ShrinkTiling | ExpandTiling) -> None:
    sizes = asdict(found)
    assert all(sizes[name] == power_of_two(sizes[name]) for name in sizes if name.startswith("block_"))
    assert found.block_rows >= 16
    assert found.num_warps in (1, 2, 4, 8)
    if isinstance(found, ShrinkTiling):
        assert found.split_width >= found.block_k
    else:
        assert found.span % found.block_columns == 0


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_are_sound(path: Path) -> None:
    table = read_table(path)
    assert table.shrink
    assert table.expand
    for _, shrink in table.shrink:
        _check(shrink)
    for _, expand in table.expand:
        _check(expand)


def test_the_nearest_point_wins_within_reach() -> None:
    small, large = (ShrinkTiling(16, 128, width, 4, 3) for width in (128, 1024))
    entries = [
        (tiling.point(num_slices=1, width=4096, max_rank=16, chunk_length=16, max_chunks=1), small),
        (tiling.point(num_slices=1, width=4096, max_rank=16, chunk_length=16, max_chunks=64), large),
    ]
    assert nearest(entries, _shape(max_chunks=2)) is small
    assert nearest(entries, _shape(max_chunks=40)) is large
    assert nearest(entries, _shape(max_chunks=0)) is small
    assert nearest(entries, _shape(width=100, max_chunks=64)) is None
    assert nearest(entries, _shape(dtype=torch.float32)) is None


def test_tilings_for_few_rows_do_not_stand_in_for_many() -> None:
    few = ShrinkTiling(16, 128, 128, 4, 3)
    entries = [(tiling.point(num_slices=1, width=4096, max_rank=16, chunk_length=32, max_chunks=8), few)]
    assert nearest(entries, _shape(chunk_length=16, max_chunks=8)) is few
    assert nearest(entries, _shape(chunk_length=64, max_chunks=8)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("chunk_length", [16, 32, 64, 128])
@pytest.mark.parametrize("width", [17, 896, 4096, 128256])
def test_the_rule_holds_for_any_shape(width: int, chunk_length: int, dtype: torch.dtype) -> None:
    for max_rank in (1, 16, 512):
        for max_chunks in (0, 1, 64, 1024):
            shape = _shape(width, max_rank, chunk_length, max_chunks, dtype)
            _check(tiling.shrink_tiling(shape))
            _check(tiling.expand_tiling(shape))
