"""Conversions and the safetensors reader against torch and safetensors themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.torch import load_file, save_file

from lorafleet.adapter_store.tensor_file import TensorFile, write_tensors
from lorafleet.adapter_store.tensors import STORED, FloatTag, Tensor

TORCH: dict[FloatTag, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
UNSIGNED = {8: np.uint64, 4: np.uint32, 2: np.uint16}


def as_torch(tensor: Tensor) -> torch.Tensor:
    return torch.from_numpy(tensor.array.copy()).view(TORCH[tensor.tag])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Every bit pattern may come: subnormals, ties, both zeros, infinities, NaNs."""
    tag = draw(st.sampled_from(list(TORCH)))
    stored = STORED[tag]
    bits = draw(npst.arrays(UNSIGNED[stored.itemsize], st.integers(1, 16)))
    return Tensor(tag, bits.view(stored))


@given(tensors(), st.sampled_from(list(TORCH)))
def test_conversion_is_torchs(tensor: Tensor, to: FloatTag) -> None:
    finite = as_torch(tensor).isfinite()
    found = as_torch(tensor.to(to))
    # torch goes from float64 to bfloat16 by way of float32, as is done here.
    torch.testing.assert_close(found[finite], as_torch(tensor).to(TORCH[to])[finite], rtol=0, atol=0)


@given(tensors())
def test_finiteness_is_torchs(tensor: Tensor) -> None:
    assert tensor.is_finite() == bool(as_torch(tensor).isfinite().all())


@pytest.mark.parametrize("tag", TORCH)
def test_reads_what_safetensors_wrote(tag: FloatTag, tmp_path: Path) -> None:
    saved = {"b": torch.randn(3, 5).to(TORCH[tag]), "a": torch.randn(7).to(TORCH[tag]), "none": torch.zeros(0, 4)}
    save_file(saved, tmp_path / "file", metadata={"format": "pt"})
    file = TensorFile.open(tmp_path / "file")
    assert file.entries.keys() == saved.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(as_torch(file.read(name)), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("tag", TORCH)
def test_safetensors_reads_what_was_written(tag: FloatTag, tmp_path: Path) -> None:
    saved = {"b": torch.randn(3, 5).to(TORCH[tag]), "a": torch.randn(7).to(TORCH[tag])}
    save_file(saved, tmp_path / "file")
    file = TensorFile.open(tmp_path / "file")
    write_tensors(tmp_path / "again", {name: file.read(name) for name in file.entries})
    for name, tensor in load_file(tmp_path / "again").items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
