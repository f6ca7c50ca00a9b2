"""Shrink: h = x A^T, each row with its own adapter's A.

Checks the arguments, then runs the Triton kernel of `shrink_triton` on CUDA and plain torch elsewhere.
"""

from __future__ import annotations

from torch import Tensor

from lorafleet.kernels import reference
from lorafleet.kernels.checks import check_matrix, check_slots
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import LoraWeights

Hidden = reference.Hidden | Tensor
"""What `shrink` leaves for `expand`; its layout is the backend's own."""


def shrink(x: Tensor, weights: LoraWeights, segments: Segments) -> Hidden:
    """Compute h = x @ A^T for every slice of `weights`, each row with its own adapter's A.

    x: (rows, in_dim) in the pool's dtype, unit stride along in_dim. Returns h for `expand`. Raises ValueError for a
    wrong shape, stride, dtype or device, and for a slot that the row tables do not have.
    """
    check_matrix("x", x, segments.num_rows, weights.in_dim, weights.pool, (weights.pool.dtype,))
    check_slots(weights, segments)
    if x.is_cuda:
        # Triton exists on Linux alone, and takes a while to import.
        from lorafleet.kernels import shrink_triton

        return shrink_triton.shrink(x, weights, segments)
    return reference.shrink(x, weights, segments)
