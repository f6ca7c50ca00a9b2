"""Tests of kernels and of workers see NaN where a result reads memory that nobody wrote (`fresh_memory_is_nan`)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="memory is filled where tests run on the CPU")
MAKERS: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(64),
    "empty_like": lambda: torch.empty_like(torch.zeros(64)),
    "new_empty": lambda: torch.zeros(1).new_empty(64),
    "empty_strided": lambda: torch.empty_strided((8, 8), (8, 1)),
    "half": lambda: torch.empty(64, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_new_floats_are_nan_in_every_thread(maker: str) -> None:
    found = [MAKERS[maker]()]
    thread = threading.Thread(target=lambda: found.append(MAKERS[maker]()))
    thread.start()
    thread.join()
    assert [each.isnan().all().item() for each in found] == [True, True]


def test_new_integers_are_no_index() -> None:
    assert (torch.empty(64, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
