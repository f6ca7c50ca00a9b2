"""Puts a worker's parts together: base, memory, loader, runner, engine. Workers and benchmarks start from here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.workers.adapter_loader import AdapterLoader
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.engine import Delivery, Engine
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.memory.residency import Residency
from lorafleet.workers.model.geometry import TORCH_DTYPES, projection_groups, read_config, resolve_device
from lorafleet.workers.model.loader import BaseModel, load_base, load_tokenizer, max_model_len
from lorafleet.workers.model.rehearsal import rehearse
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model.startup import start_runner
from lorafleet.workers.ranks import Ranks
from lorafleet.workers.sizing import memory_sizes
from lorafleet.workers.step.forms import graph_forms

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Parts that every rank of a worker has: its part of the base, and its memory."""

    base: BaseModel
    cache: KVCache
    pool: AdapterPool
    runner: ModelRunner
    startup_s: dict[str, float]
    """Seconds of each part of the start."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """Parts of one worker. The engine is not started."""

    engine: Engine
    runner: ModelRunner
    cache: KVCache
    pool: AdapterPool
    residency: Residency
    loader: AdapterLoader
    startup_s: dict[str, float]
    """Seconds of the start: loading, and on a GPU compiling, warming up and capturing; `ready`: all of it."""


def assemble_model(
    model: ModelConfig,
    engine: EngineConfig,
    pool: PoolConfig,
    *,
    ranks: Ranks | None = None,
    captures: bool = True,
) -> ModelParts:
    """Load this rank's part of the base and lay out its device's memory. All ranks call it with the same arguments.

    `engine.device` is the rank's own. The other arguments are as in `assemble`.

    Raises UnsupportedModel and WorkerConfigError.
    """
    started_s = time.monotonic()
    ranks = ranks or Ranks()
    device = resolve_device(engine.device)
    config = read_config(model)
    if ranks.is_first:
        rehearse(config, max_model_len(model, config))
    base = load_base(model, device, ranks)
    load_s = time.monotonic() - started_s
    linear = [name for name, shape in base.geometry.modules.items() if shape.kind == "linear"]
    layout = PoolLayout.of(base.geometry, projection_groups(linear), pool.max_rank)
    sizes = memory_sizes(base, engine, pool)
    adapter_pool = AdapterPool(layout, pool_bytes=sizes.pool_bytes, max_slots=pool.max_slots, device=device)
    cache = KVCache(
        base.layers,
        num_pages=sizes.num_kv_pages,
        page_tokens=engine.kv_page_tokens,
        dtype=TORCH_DTYPES[base.dtype],
        device=device,
        prefix_cache=engine.prefix_cache != "off",
    )
    max_pages = cache.pages_for(base.max_model_len + 1)
    num_weights = sum(
        shape.in_dim * shape.out_dim for shape in base.geometry.modules.values() if shape.kind == "linear"
    )
    forms = graph_forms(engine.max_running, engine.max_batch_tokens, max_pages, num_weights)
    runner = start_runner(
        base,
        cache,
        adapter_pool,
        max_pages=max_pages,
        graph_forms=forms if captures else (),
        max_batch_tokens=engine.max_batch_tokens,
        max_pass_rows=engine.logits_chunk_tokens,
        ranks=ranks,
    )
    return ModelParts(base, cache, adapter_pool, runner, {"load": load_s, **runner.startup_s})


def assemble(
    *,
    worker_id: str,
    model: ModelConfig,
    engine: EngineConfig,
    pool: PoolConfig,
    fetch: Callable[[str], AdapterWeights],
    deliver: Callable[[list[Delivery]], None],
    captures: bool = True,
    ranks: Ranks | None = None,
) -> WorkerParts:
    """Put a worker together. `fetch` may block; `deliver` is called on the engine's thread.

    Without `captures` no step runs as a CUDA graph, for comparisons. ranks: this one, the first, among others, which
    call `assemble_model`.

    Raises UnsupportedModel and WorkerConfigError.
    """
    started_s = time.monotonic()
    parts = assemble_model(model, engine, pool, ranks=ranks, captures=captures)
    cache, device = parts.cache, parts.base.device
    residency = Residency(parts.pool)
    loader = AdapterLoader(parts.pool, residency, fetch, on_gone=cache.drop)
    startup_s = {**parts.startup_s, "ready": time.monotonic() - started_s}
    logger.info(
        "worker %s: %s on %s in %s, %d KV pages of %d tokens, %d adapter pages of %d bytes; seconds: %s",
        worker_id,
        model.id,
        device,
        parts.base.dtype,
        cache.counts.total,
        engine.kv_page_tokens,
        parts.pool.num_pages_total,
        parts.pool.layout.page_bytes,
        ", ".join(f"{part} {seconds:.1f}" for part, seconds in startup_s.items()),
    )
    if device.type == "cuda":
        free, total = (num_bytes / 2**30 for num_bytes in torch.cuda.mem_get_info(device))
        logger.info("worker %s: %.1f of the GPU's %.1f GiB are left", worker_id, free, total)
    return WorkerParts(
        engine=Engine(parts.runner, loader, load_tokenizer(model.source), engine, deliver, worker_id=worker_id),
        runner=parts.runner,
        cache=cache,
        pool=parts.pool,
        residency=residency,
        loader=loader,
        startup_s=startup_s,
    )
