"""Checks of arguments that the operations of LoRA share: a matrix of rows, and the slots of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import LoraEmbeddingWeights, LoraWeights


def check_matrix(
    name: str, matrix: Tensor, rows: int, width: int, pool: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ValueError unless `matrix` is (rows, width) of a dtype and device, with unit stride along a row."""
    if matrix.dim() != 2 or matrix.shape[0] != rows or matrix.shape[1] != width:
        raise ValueError(f"{name} must have shape ({rows}, {width}), got {tuple(matrix.shape)}")
    if matrix.stride(1) != 1:
        raise ValueError(f"{name} must have unit stride along its last dimension, got strides {matrix.stride()}")
    if matrix.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {matrix.dtype}")
    if matrix.device != pool.device:
        raise ValueError(f"{name} must be on the pool's device {pool.device}, got {matrix.device}")


def check_slots(weights: LoraWeights | LoraEmbeddingWeights, segments: Segments) -> None:
    """Raise ValueError unless the row tables have the slot of every row."""
    if segments.max_slot >= weights.ranks.shape[0]:
        raise ValueError(
            f"slot {segments.max_slot} is out of range: the row tables have {weights.ranks.shape[0]} slots"
        )
