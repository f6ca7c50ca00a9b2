"""Where kernels run: Triton's interpreter on the CPU, or a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.fresh_memory import nan_filled

if not torch.cuda.is_available():
    # Read by Triton when it is imported: before any kernel is.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def interpreter() -> None:
    """Skips where kernels are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")


@pytest.fixture
def cuda() -> torch.device:
    """A GPU, or a skip."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """No result may depend on memory that nobody wrote."""
    with nan_filled():
        yield
