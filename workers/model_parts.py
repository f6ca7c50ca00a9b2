"""One rank's part of a worker: its base on its device, the memories of KV and adapters, and the runner over them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lorafleet.adapter_store.manifest import BaseGeometry
from lorafleet.workers.checkpoint import max_model_len, read_config
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.memory.state_store import StateStore
from lorafleet.workers.model.geometry import projection_groups, read_geometry, resolve_device, without
from lorafleet.workers.model.loader import BaseModel, load_base
from lorafleet.workers.model.rehearsal import rehearse
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model.startup import start_runner
from lorafleet.workers.ranks import Ranks
from lorafleet.workers.sizing import MemorySizes, compresses_latents, kv_dtype, memory_sizes
from lorafleet.workers.step.forms import graph_forms


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Parts that every rank of a worker has: its part of the base, and its memory."""

    base: BaseModel
    cache: KVCache
    pool: AdapterPool
    runner: ModelRunner
    startup_s: dict[str, float]
    """Seconds of each part of the start."""


def served_geometry(model: ModelConfig, engine: EngineConfig, device: str) -> BaseGeometry:
    """The modules that an adapter may target, less those on which it would be computed wrong, for a worker's `device`.

    A base that is not served has all: its worker says why. Raises UnsupportedModel and WorkerConfigError.
    """
    geometry, config = read_geometry(model, device), read_config(model)
    try:
        compresses = compresses_latents(engine, resolve_device(device))
        off = rehearse(config, max_model_len(model, config), compresses=compresses)
    except WorkerConfigError:
        return geometry
    return without(geometry, off)


def device_of(engine: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: of several ranks on GPUs each has its own. Raises WorkerConfigError."""
    device, size = resolve_device(engine.device), engine.tensor_parallel_size
    if device.type == "cpu" or size == 1:
        return device
    num_gpus = torch.cuda.device_count()
    if num_gpus < size:
        raise WorkerConfigError(
            f"worker.tensor_parallel_size={size} takes {size} GPUs of one machine, and the worker sees {num_gpus}: "
            f"set worker.num_gpus to {size} or lower worker.tensor_parallel_size"
        )
    return torch.device("cuda", rank)


def assemble_model(
    model: ModelConfig,
    engine: EngineConfig,
    pool: PoolConfig,
    *,
    ranks: Ranks | None = None,
    captures: bool = True,
    agree: Callable[[MemorySizes], MemorySizes] = lambda sizes: sizes,
    make_cache: type[KVCache] = KVCache,
    make_pool: type[AdapterPool] = AdapterPool,
) -> ModelParts:
    """Load this rank's part of the base and lay out its device's memory. All ranks call it with the same arguments.

    `captures`: whether steps are captured as CUDA graphs, where there is a GPU. agree: the sizes that all ranks have
    room for, given this one's.

    Raises UnsupportedModel and WorkerConfigError.
    """
    started_s = time.monotonic()
    ranks = ranks or Ranks()
    device = device_of(engine, ranks.rank)
    compresses = compresses_latents(engine, device)
    off = _rehearsed(model, ranks, compresses=compresses) if ranks.is_first else frozenset()
    rehearsal_s = time.monotonic() - started_s
    try:
        base = load_base(model, device, ranks, compresses=compresses)
    except torch.OutOfMemoryError as error:
        raise WorkerConfigError(_does_not_fit(device, ranks)) from error
    base = replace(base, geometry=without(base.geometry, off))
    load_s = time.monotonic() - started_s - rehearsal_s
    linear = [name for name, shape in base.geometry.modules.items() if shape.kind == "linear"]
    layout = PoolLayout.of(base.geometry, projection_groups(linear), pool.max_rank, base.shares)
    sizes = agree(memory_sizes(base, engine, pool))
    adapter_pool = make_pool(layout, pool_bytes=sizes.pool_bytes, max_slots=pool.max_slots, device=device, ranks=ranks)
    cache = make_cache(
        base.layers,
        num_pages=sizes.num_kv_pages,
        page_tokens=engine.kv_page_tokens,
        dtype=kv_dtype(base, engine),
        device=device,
        # What a prefix left in states is not kept.
        prefix_cache=engine.prefix_cache != "off" and not base.states,
    )
    states = StateStore(base.states, num_slots=engine.max_running, device=device)
    max_pages = cache.pages_for(base.max_model_len + 1)
    forms = graph_forms(
        engine.max_running, engine.max_batch_tokens, max_pages, _num_weights(base), has_states=states.has_states
    )
    runner = start_runner(
        base,
        cache,
        adapter_pool,
        states,
        max_pages=max_pages,
        graph_forms=forms if captures else (),
        max_batch_tokens=engine.max_batch_tokens,
        max_pass_rows=engine.logits_chunk_tokens,
        ranks=ranks,
    )
    startup_s = {"rehearsal": rehearsal_s, "load": load_s, **runner.startup_s}
    return ModelParts(base, cache, adapter_pool, runner, startup_s)


def _rehearsed(model: ModelConfig, ranks: Ranks, *, compresses: bool) -> frozenset[str]:
    """Kinds of modules on which adapters would be computed wrong. Raises UnsupportedModel if ranks share them."""
    config = read_config(model)
    off = rehearse(config, max_model_len(model, config), compresses=compresses)
    if off and ranks.size > 1:
        raise UnsupportedModel(
            f"adapters on {', '.join(sorted(off))} would be computed wrong, which one device can leave out, and "
            f"{ranks.size} cannot: set worker.tensor_parallel_size to 1"
        )
    return off


def _num_weights(base: BaseModel) -> int:
    """Weights of this rank's linear layers, experts included."""
    shapes = base.geometry.modules.values()
    return sum(each.in_dim * each.out_dim * each.num_experts for each in shapes if each.kind != "embedding")


def _does_not_fit(device: torch.device, ranks: Ranks) -> str:
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    part = "the base" if ranks.size == 1 else f"a part of the base, which is cut in {ranks.size},"
    return (
        f"{part} does not fit the {gib:.0f} GiB of {device}: raise worker.tensor_parallel_size ({ranks.size}), "
        "set model.quantization to fp8, end what else runs on the GPU, or take a smaller base"
    )
