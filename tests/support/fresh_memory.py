"""Fills torch's new memory with NaN, so that a result that reads memory nobody wrote is seen.

Without it, new memory often holds zeros, and such a result looks right by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nan_filled() -> Iterator[None]:
    """`torch.empty` and its like give NaN, or the largest integer, on the CPU.

    On a GPU nothing changes: there the same switch refuses cuBLAS and replaces algorithms.
    """
    if torch.cuda.is_available():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
