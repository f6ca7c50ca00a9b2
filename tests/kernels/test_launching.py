"""Launches that only compile: what a starting worker does before its first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from lorafleet.kernels import fused_triton
from lorafleet.kernels.launching import compiled_ahead, launch
from lorafleet.kernels.norms import Norm, NormRule
from tests.kernels import hopper

ROOT = Path(__file__).parents[2]


@dataclass
class RecordingKernel:
    """Stands for a kernel of Triton's."""

    launched: list[tuple[object, ...]] = field(default_factory=list)
    warmed: list[tuple[object, ...]] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))

    def warmup(self, *arguments: object, grid: tuple[int, ...], **options: object) -> None:
        self.warmed.append((grid, arguments, options))


def test_launches_as_triton_does() -> None:
    kernel = RecordingKernel()
    launch(kernel, (3, 4))(1, 2.0, BLOCK=16)
    assert kernel.launched == [((3, 4), (1, 2.0), {"BLOCK": 16})]
    assert kernel.warmed == []


def test_a_kind_of_launch_is_compiled_once() -> None:
    kernel = RecordingKernel()
    x = torch.zeros(64)
    kinds = [
        ((x, 32, 0.5), {"BLOCK": 16}),
        ((x[1:], 32, 0.5), {"BLOCK": 16}),  # its memory begins elsewhere
        ((x, 33, 0.5), {"BLOCK": 16}),
        ((x, 1, 0.5), {"BLOCK": 16}),
        ((x, 1 << 40, 0.5), {"BLOCK": 16}),
        ((x, 32, None), {"BLOCK": 16}),
        ((x.half(), 32, 0.5), {"BLOCK": 16}),
        ((x, 32, 0.5), {"BLOCK": 32}),
    ]
    with compiled_ahead(1):
        for arguments, options in [*kinds, *kinds, ((x[4:], 48, 0.25), {"BLOCK": 16})]:
            launch(kernel, (1,))(*arguments, **options)
    assert len(kernel.warmed) == len(kinds)
    assert kernel.launched == []
    launch(kernel, (1,))(x)
    assert len(kernel.launched) == 1


def test_what_fails_in_it_leaves_it() -> None:
    with pytest.raises(ZeroDivisionError), compiled_ahead(1):
        raise ZeroDivisionError
    with compiled_ahead(1):
        pass


def test_nothing_is_written(interpreter: None) -> None:
    x, weight, residual = torch.ones(2, 32), torch.ones(32), torch.full((2, 32), 3.0)
    with compiled_ahead(1):
        fused_triton.rms_norm(x, Norm(weight, NormRule(1e-5)), residual)
    assert (residual == 3.0).all()
    fused_triton.rms_norm(x, Norm(weight, NormRule(1e-5)), residual)
    assert (residual == 4.0).all()


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """In a process without Triton's interpreter. Ahead of its launches, in threads, and none twice."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.hopper"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert sorted(kernels) == sorted(hopper.KERNELS)
    for name, shared in kernels.items():
        assert shared <= hopper.MAX_SHARED_BYTES, name
