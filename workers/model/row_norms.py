"""Norms of a base's weights with an adapter's added, which DoRA divides its magnitudes by. Computed once a load.

They are left as squares, since ranks that hold some of the inputs each add theirs up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafleet.workers.model.lora_layers import LoraEmbedding, ProjectionSlice

MAX_ELEMENTS = 1 << 23
"""Of a matrix that are in memory in float32 at once, beside the matrix."""


class RowNorms:
    """`AdapterPool.row_norms` of a substituted model. Loader threads call it beside the step loop."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.inference_mode()
    def __call__(self, name: str, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """The sum of squares of each output's weights: of a linear module over inputs, of an embedding over tokens.

        a: (rank, in_dim), or (num_embeddings, rank) of an embedding. b: (rank, out_dim). Returns (out_dim,) float32.
        """
        module = self._model.get_submodule(name)
        if isinstance(module, LoraEmbedding):
            squares = torch.zeros(b.shape[1], device=b.device)
            step = max(1, MAX_ELEMENTS // b.shape[1])
            for matrix, rows in zip(torch.split(module.weight, step), torch.split(a, step), strict=True):
                squares += _sum(matrix, rows, b, scaling).square_().sum(0)
            return squares
        assert isinstance(module, ProjectionSlice), name
        norms = []
        step = max(1, MAX_ELEMENTS // a.shape[1])
        scales = module.weight_scales
        for first in range(0, b.shape[1], step):
            matrix, columns = module.weight[first : first + step], b[:, first : first + step]
            if scales is not None:
                matrix = matrix.float() * scales[first : first + step, None]
            norms.append(torch.linalg.vector_norm(_sum(matrix, columns.t(), a, scaling), dim=1).square_())
        return torch.cat(norms)


def _sum(matrix: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """(rows, width) float32: matrix + scaling * left @ right."""
    return torch.addmm(matrix.float(), left.float(), right.float(), alpha=scaling)
