"""Copies rows of a flat array to their places in a pool, and so an adapter's weights into its pages.

Checks the arguments, then runs the Triton kernel of `row_copy_triton` on CUDA and numpy elsewhere. Nothing
synchronises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorafleet.kernels.weights import ROW_ALIGN, aligned

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def place_rows(source: Tensor, pool: Tensor, moves: Tensor, *, is_aligned: bool = False) -> None:
    """Copy pool[place : place + width] = source[start : start + width] for every row, and zeros up to its pitch.

    source, pool: flat and contiguous, of one dtype and device.
    moves: (3, num_rows) int64 on that device, unit stride along num_rows: starts, widths and places of the rows. Places
    are multiples of ROW_ALIGN.
    is_aligned: starts and widths are multiples of LOAD_ALIGN.

    A row's pitch is its width, rounded up to ROW_ALIGN. Pitches do not overlap, and elements outside them keep their
    bits. The caller guarantees on CUDA that rows lie within source and pool. Raises ValueError.
    """
    for name, tensor in (("source", source), ("pool", pool)):
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be flat and contiguous, got shape {tuple(tensor.shape)}")
        if (tensor.dtype, tensor.device) != (pool.dtype, pool.device):
            raise ValueError(f"{name} must be {pool.dtype} on {pool.device}, got {tensor.dtype} on {tensor.device}")
    if moves.dim() != 2 or moves.shape[0] != 3 or moves.dtype != torch.int64 or moves.device != pool.device:
        raise ValueError(
            f"moves must be int64 of shape (3, num_rows) on {pool.device},"
            f" got {moves.dtype} of shape {tuple(moves.shape)} on {moves.device}"
        )
    if moves.shape[1] > 1 and moves.stride(1) != 1:
        raise ValueError(f"moves must have unit stride along its last dimension, got strides {moves.stride()}")
    if pool.is_cuda:
        # Triton exists on Linux alone, and takes a while to import.
        from lorafleet.kernels import row_copy_triton

        row_copy_triton.copy_rows(source, pool, moves, is_aligned=is_aligned)
    else:
        _copy_rows(_bits(source), _bits(pool), moves.numpy())


def _copy_rows(
    source: npt.NDArray[np.signedinteger[Any]], pool: npt.NDArray[np.signedinteger[Any]], moves: npt.NDArray[np.int64]
) -> None:
    """Rows of one width that are neighbours in both, as the ranks of a module are for the most part, in one copy."""
    starts, widths, places = moves
    pitches = aligned(widths)
    is_first = np.ones(len(starts), dtype=bool)
    is_first[1:] = (np.diff(widths) != 0) | (np.diff(starts) != widths[:-1]) | (np.diff(places) != pitches[:-1])
    if np.any(starts < 0) or np.any(widths < 0) or np.any(starts + widths > len(source)):
        raise ValueError(f"rows must lie within the {len(source)} elements of source")
    if np.any(places < 0) or np.any(places % ROW_ALIGN) or np.any(places + pitches > len(pool)):
        raise ValueError(f"places must be multiples of {ROW_ALIGN} within the {len(pool)} elements of pool")
    firsts = np.flatnonzero(is_first)
    counts = np.diff(firsts, append=len(starts))
    columns = (starts[firsts], widths[firsts], places[firsts], pitches[firsts], counts)
    for start, width, place, pitch, count in zip(*(column.tolist() for column in columns), strict=True):
        target = pool[place : place + count * pitch].reshape(count, pitch)
        target[:, :width] = source[start : start + count * width].reshape(count, width)
        if width < pitch:
            target[:, width:] = 0


def _bits(tensor: Tensor) -> npt.NDArray[np.signedinteger[Any]]:
    """The tensor's memory; numpy has no bfloat16."""
    array: npt.NDArray[np.signedinteger[Any]] = tensor.view(_BITS[tensor.itemsize]).numpy()
    return array
