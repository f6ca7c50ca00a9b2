"""Views of resident adapters' extras in the pool's pages.

`AdapterPool` makes these, the layers of `workers/model` read them. They live as long as their adapter is resident.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafleet.kernels.weights import ROW_ALIGN

MAX_GATHERED = 1 << 24
"""Elements of a matrix that are copied out of the pages at once."""


@dataclass(frozen=True, slots=True, eq=False)
class ExtraVector:
    """One row: a parameter of a norm, or what is added to the output of a module, or what scales it."""

    parts: tuple[Tensor, ...]
    """Views of the pool, side by side: whole pages and what is left, so one for a row that is no wider than a page."""

    @property
    def value(self) -> Tensor:
        """(width,) view of the pool; for rows of one part."""
        (value,) = self.parts
        return value

    def divide_by(self, norms: Tensor) -> None:
        """Put the row / norms - 1 in its place; 0 where a norm is 0. norms: (width,) float32."""
        largest = torch.finfo(self.parts[0].dtype).max
        for part, norm in zip(self.parts, torch.split(norms, [len(part) for part in self.parts]), strict=True):
            scale = torch.where(norm > 0, part.float() / norm - 1, 0.0)
            part.copy_(scale.clamp_(-largest, largest))


@dataclass(frozen=True, slots=True, eq=False)
class ExtraMatrix:
    """Many rows, each contiguous in a page: the matrix of an embedding or of a head, a row a token."""

    pool: Tensor
    """The whole pool, flat."""
    starts: Tensor
    """(num_rows,) int32, where each row starts, in ROW_ALIGN elements."""
    width: int

    def take(self, rows: Tensor) -> Tensor:
        """(n, width) copy of the rows. rows: (n,) int32 or int64."""
        return self._copy(self.starts.index_select(0, rows))

    def product(self, x: Tensor) -> Tensor:
        """Compute x @ matrix^T. x: (n, width) -> (n, num_rows), both in the pool's dtype."""
        num_rows = len(self.starts)
        y = x.new_empty((len(x), num_rows))
        step = max(1, MAX_GATHERED // self.width)
        for first in range(0, num_rows, step):
            matrix = self._copy(self.starts[first : first + step])
            torch.mm(x, matrix.t(), out=y[:, first : first + step])
        return y

    def _copy(self, starts: Tensor) -> Tensor:
        # Rows start at any multiple of ROW_ALIGN, so the pool is read as overlapping windows.
        num_windows = (len(self.pool) - self.width) // ROW_ALIGN + 1
        return self.pool.as_strided((num_windows, self.width), (ROW_ALIGN, 1)).index_select(0, starts)


Extra = ExtraVector | ExtraMatrix
