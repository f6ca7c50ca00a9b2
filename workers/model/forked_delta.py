"""Adapters' products that run beside the base's: a captured step forks, and joins where both are added.

The base's product of few rows reads its weights and nothing else, at the speed of memory, but cannot fill the time in
which kernels begin and end. The adapters' kernels, one after another, have more of such times than of bytes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lorafleet.kernels import ops
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import LoraWeights

MOST_ROWS = 256
"""The base's product of more rows leaves the GPU no room for others beside it."""


def forks(x: Tensor) -> bool:
    """Return True where the products of x (rows, in_dim) fork: in a capture, for it costs the host some launches."""
    return x.is_cuda and x.shape[0] <= MOST_ROWS and torch.cuda.is_current_stream_capturing()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class ForkedDelta:
    """Each row's own B A x, plus a bias, computed beside what the stream gets until it is asked for."""

    def __init__(self, x: Tensor, weights: LoraWeights, segments: Segments, bias: Tensor | None = None) -> None:
        """x: (rows, in_dim). bias: (out_dim,)."""
        # Memory of this stream, which takes it back behind the join.
        self._delta = x.new_empty((x.shape[0], weights.out_dim))
        self._side = _side_stream(x.device)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            h = ops.shrink(x, weights, segments)
            ops.expand(h, weights, segments, self._delta, accumulate=False, bias=bias)

    def joined(self) -> Tensor:
        """(rows, out_dim), for what the stream gets from now on."""
        torch.cuda.current_stream().wait_stream(self._side)
        return self._delta
