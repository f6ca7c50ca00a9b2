"""The delta of an embedding: y += A[:, token]^T B, each row with its own adapter's factors.

Checks the arguments, then runs the Triton kernels of `embedding_triton` and `expand_triton` on CUDA and plain torch
elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafleet.kernels import reference
from lorafleet.kernels.checks import check_matrix, check_slots
from lorafleet.kernels.expand import expand
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import LoraEmbeddingWeights


def embed(
    token_ids: Tensor, weights: LoraEmbeddingWeights, segments: Segments, y: Tensor, *, is_part: bool = False
) -> None:
    """Compute y += A[:, token_ids]^T @ B * scaling in place: the delta of an embedding.

    token_ids: (rows,) int32 or int64, each below `num_embeddings`, unless `is_part`: then a token that `weights` lacks
    adds nothing. On CUDA the caller guarantees that, and that they were written before the kernel ahead of this call
    began. y: as in `expand`. Raises ValueError.
    """
    if token_ids.dim() != 1 or token_ids.shape[0] != segments.num_rows:
        raise ValueError(f"token_ids must have shape ({segments.num_rows},), got {tuple(token_ids.shape)}")
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token_ids must be int32 or int64, got {token_ids.dtype}")
    check_matrix("y", y, segments.num_rows, weights.out_dim, weights.pool, (weights.pool.dtype, torch.float32))
    check_slots(weights, segments)
    if token_ids.is_cuda:
        from lorafleet.kernels import embedding_triton

        expand(embedding_triton.lookup(token_ids, weights, segments), weights, segments, y)
    elif segments.has_lora:
        low, high = (int(bound) for bound in token_ids.aminmax())
        if not is_part and (low < 0 or high >= weights.num_embeddings):
            raise ValueError(f"token ids must lie in [0, {weights.num_embeddings}), got {low} to {high}")
        expand(reference.shrink_embedding(token_ids, weights, segments), weights, segments, y)
