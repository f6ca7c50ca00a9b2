"""Cuts each launch into programs: measured tables for known GPUs, a rule for everything else.

`kernels/tuned/<GPU>.json` holds what `lorafleet.kernels.tune` found best at sample points; a launch takes the nearest
point of its kind, or the rule when none is near. A tiling is made of sizes that fit any width, so that a point serves
its whole neighbourhood.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import log2
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

MAX_SPLITS = 32
"""Bound of the splits of the input width; expand reads h once for each."""
FEW_ROWS = 32
"""Row tiles up to this size take the kernels' paths for few rows."""

VIEWS = ("ranks", "scalings", "row_slots", "permutation", "chunk_indptr", "chunk_slots")
"""Kernel arguments that are views into larger tensors: where they start must not make another kernel of it."""


@dataclass(frozen=True, slots=True)
class ShrinkTiling:
    """Tiling of shrink: see `kernels/shrink_triton.py`."""

    block_rows: int
    block_k: int
    split_width: int
    """Columns of x that one program takes: a multiple of `block_k`."""
    num_warps: int
    num_stages: int
    early: bool = True
    """Expand's programs may come up while this kernel's still run: hides its start, but takes their room."""


@dataclass(frozen=True, slots=True)
class ExpandTiling:
    """Tiling of expand: see `kernels/expand_triton.py`."""

    block_rows: int
    block_columns: int
    """Columns of one step, at most."""
    block_elements: int
    """Elements of B of one step: ranks times columns, at most."""
    span: int
    """Columns of one program."""
    split_h: bool
    """h goes into the product as two halves of the weights' dtype instead of being rounded to one."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Key of a tiling. All of it is known on the host; the adapters' own ranks are no part of it."""

    num_slices: int
    width: int
    """in_dim for shrink, out_dim for expand."""
    max_rank: int
    chunk_length: int
    max_chunks: int
    """Launches round theirs up to a power of two: batches of any number of chunks share a few compiled kernels."""
    dtype: torch.dtype
    device: torch.device


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@cache
def shrink_tiling(shape: Shape) -> ShrinkTiling:
    return nearest(_table(shape.device).shrink, shape) or _shrink_rule(shape)


@cache
def expand_tiling(shape: Shape) -> ExpandTiling:
    return nearest(_table(shape.device).expand, shape) or _expand_rule(shape)


def dependent_launch(tensor: Tensor) -> bool:
    """Return True if kernels on the tensor's device may start while the kernel ahead still runs."""
    return tensor.is_cuda and _capability(tensor.device)[0] >= 9


_MOST_STAGES = 4
"""Of a program whose tiling says one, when it has more steps than one."""


def stages(wanted: int, steps: int, tile_bytes: int, tensor: Tensor) -> int:
    """Return as many of the wanted stages as a program's shared memory holds, each with its tiles in flight.

    A tiling of one stage was measured for a program of one step. If the ranks or the width make several steps of it,
    they would wait for each other's loads.
    """
    if wanted == 1:
        wanted = min(steps, _MOST_STAGES)
    return max(1, min(wanted, shared_bytes(tensor) // tile_bytes))


def shared_bytes(tensor: Tensor) -> int:
    """Return the bytes of shared memory that a program on the tensor's device may have; many where that is none."""
    return _shared_bytes(tensor.device) if tensor.is_cuda else 1 << 20


@cache
def _shared_bytes(device: torch.device) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    # Some is the compiler's own, for reductions and layouts.
    return int(properties["max_shared_mem"]) - 8192


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _shrink_rule(shape: Shape) -> ShrinkTiling:
    """Enough splits to fill the GPU with the rows that there are."""
    if shape.dtype == torch.float32:
        # No tensor cores: small tiles, for the sake of registers.
        return ShrinkTiling(16, 32, max(32, power_of_two(shape.width) // 8), num_warps=4, num_stages=2)
    if shape.chunk_length <= FEW_ROWS:
        split_width = min(2048, power_of_two(max(128, shape.width * shape.max_chunks // 512)))
        return ShrinkTiling(16, 128, split_width, num_warps=4, num_stages=min(4, split_width // 128))
    split_width = power_of_two(max(512, shape.width * shape.max_chunks * shape.chunk_length // 16384))
    many_columns = shape.num_slices * shape.max_rank > 128
    return ShrinkTiling(64, 64, split_width, num_warps=8 if many_columns else 4, num_stages=4)


def _expand_rule(shape: Shape) -> ExpandTiling:
    """A span a program as long as there are programs enough."""
    if shape.dtype == torch.float32:
        return ExpandTiling(16, 64, 1024, 256, split_h=False, num_warps=4, num_stages=2)
    if shape.chunk_length <= FEW_ROWS:
        if shape.max_chunks <= 16:
            return ExpandTiling(16, 256, 4096, 256, split_h=True, num_warps=4, num_stages=1)
        return ExpandTiling(16, 256, 4096, 1024, split_h=True, num_warps=4, num_stages=3)
    if shape.max_chunks <= 4:
        return ExpandTiling(64, 128, 16384, 128, split_h=False, num_warps=4, num_stages=1)
    return ExpandTiling(64, 128, 16384, 512, split_h=False, num_warps=4, num_stages=3)


_Tiling = TypeVar("_Tiling", ShrinkTiling, ExpandTiling)
_Point = tuple[float, ...]
_REACH = 3.0
"""How many doublings, over all dimensions, a measured point reaches."""


@dataclass(frozen=True, slots=True)
class Table:
    """Measured points and the best tiling at each."""

    shrink: Sequence[tuple[_Point, ShrinkTiling]]
    expand: Sequence[tuple[_Point, ExpandTiling]]


def table_path(device_name: str) -> Path:
    """Return the path of a GPU's table."""
    return Path(__file__).parent / "tuned" / f"{device_name.replace(' ', '_')}.json"


def point(*, num_slices: int, width: int, max_rank: int, chunk_length: int, max_chunks: int) -> _Point:
    """A shape as coordinates, in doublings."""
    return tuple(map(log2, (num_slices, width, max(16, max_rank), chunk_length, max_chunks)))


@cache
def _table(device: torch.device) -> Table:
    path = table_path(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return read_table(path) if path is not None and path.exists() else Table((), ())


def read_table(path: Path) -> Table:
    """A table as `lorafleet.kernels.tune` writes it."""
    entries: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    return Table(
        shrink=[(point(**entry["shape"]), ShrinkTiling(**entry["tiling"])) for entry in entries["shrink"]],
        expand=[(point(**entry["shape"]), ExpandTiling(**entry["tiling"])) for entry in entries["expand"]],
    )


def nearest(entries: Sequence[tuple[_Point, _Tiling]], shape: Shape) -> _Tiling | None:
    """The tiling of the point next to the shape, None if none reaches it."""
    if shape.dtype == torch.float32:
        return None
    wanted = point(
        num_slices=shape.num_slices,
        width=shape.width,
        max_rank=shape.max_rank,
        chunk_length=shape.chunk_length,
        max_chunks=max(1, shape.max_chunks),
    )
    best, best_distance = None, _REACH
    for position, tiling in entries:
        # Tilings for few rows and for many do not stand in for each other.
        if (position[3] <= log2(FEW_ROWS)) != (wanted[3] <= log2(FEW_ROWS)):
            continue
        distance = sum(abs(a - b) for a, b in zip(position, wanted, strict=True))
        if distance < best_distance:
            best, best_distance = tiling, distance
    return best
