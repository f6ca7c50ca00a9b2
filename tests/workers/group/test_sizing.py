"""Sizes of a rank, and what is said where a group does not fit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lorafleet.workers import model_parts
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.memory.shares import Share
from lorafleet.workers.model.loader import BaseModel, load_base
from lorafleet.workers.model_parts import device_of
from lorafleet.workers.sizing import AUTO_ADAPTERS, memory_sizes
from tests.workers.harness import Shelf

ON_TWO = EngineConfig(device="cpu", tensor_parallel_size=2)


@pytest.fixture
def base(llama: Shelf) -> BaseModel:
    return load_base(ModelConfig(id="base", source=str(llama.base)), torch.device("cpu"))


def test_a_pool_is_for_the_parts_that_a_rank_holds(base: BaseModel) -> None:
    """Half the outputs of every module, so all of A and half of B."""
    pool = PoolConfig(max_rank=8)
    shares = {
        name: Share.of_outputs(shape, 0, shape.out_dim // 2)
        for name, shape in base.geometry.modules.items()
        if shape.kind == "linear"
    }
    saved = sum(base.geometry.modules[name].out_dim // 2 for name in shares) * 8 * 4 * AUTO_ADAPTERS
    whole, half = (memory_sizes(each, ON_TWO, pool).pool_bytes for each in (base, replace(base, shares=shares)))
    assert whole - half == saved > 0


def test_errors_speak_of_the_group(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerConfigError, match=r"worker\.kv_bytes: 1000 bytes on each of 2 devices hold 0 KV pages"):
        memory_sizes(base, ON_TWO.model_copy(update={"kv_bytes": 1000}), PoolConfig())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    engine = EngineConfig(device="auto", tensor_parallel_size=2)
    assert [device_of(engine, rank) for rank in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(WorkerConfigError, match="takes 4 GPUs of one machine, and the worker sees 2"):
        device_of(engine.model_copy(update={"tensor_parallel_size": 4}), 0)


def test_a_base_that_fits_no_gpu_is_told_of_groups(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **named: object) -> BaseModel:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_parts, "load_base", load)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    model = ModelConfig(id="base", source=str(llama.base))
    with pytest.raises(WorkerConfigError, match=r"the base does not fit the 80 GiB of cpu: raise .*_size \(1\)"):
        model_parts.assemble_model(model, EngineConfig(device="cpu"), PoolConfig())
