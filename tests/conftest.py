"""Fixtures of all floors: tiny bases, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton, which decides then: kernel tests run in its interpreter where there is no GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
