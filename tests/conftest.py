"""Fixtures of all floors: tiny bases, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

if not torch.cuda.is_available():
    # Before anything imports triton, which decides then: kernel tests run in its interpreter where there is no GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lorafleet.kernels.reference import EXACT_ROWS
from tests.support.bases import BaseKind, make_base


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[BaseKind], Path]:
    """`base_of("llama")`: the folder of the tiny fp32 base of that kind, made at its first use."""
    made: dict[BaseKind, Path] = {}

    def of(kind: BaseKind) -> Path:
        if kind not in made:
            made[kind] = make_base(tmp_path_factory.mktemp("bases") / kind, kind)
        return made[kind]

    return of


@pytest.fixture(scope="session")
def multiplies_rows_alike() -> None:
    """Skips where BLAS itself makes a row's bits depend on how many rows there are, however many those are."""
    x, matrix = torch.randn(300, 64), torch.randn(304, 64)
    whole = F.linear(x, matrix)
    for count in (EXACT_ROWS, EXACT_ROWS + 1, 64, 131):
        if not torch.equal(F.linear(x[-count:], matrix), whole[-count:]):
            pytest.skip("BLAS sums rows otherwise beside others here")
