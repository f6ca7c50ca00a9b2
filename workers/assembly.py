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
from lorafleet.workers.model.loader import load_base, load_tokenizer, max_model_len
from lorafleet.workers.model.rehearsal import rehearse
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model.startup import start_runner
from lorafleet.workers.sizing import memory_sizes
from lorafleet.workers.step.forms import graph_forms

logger = logging.getLogger(__name__)


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


def assemble(
    *,
    worker_id: str,
    model: ModelConfig,
    engine: EngineConfig,
    pool: PoolConfig,
    fetch: Callable[[str], AdapterWeights],
    deliver: Callable[[list[Delivery]], None],
    captures: bool = True,
) -> WorkerParts:
    """Load the base and lay out the device's memory. `fetch` may block; `deliver` is called on the engine's thread.

    Without `captures` no step runs as a CUDA graph, for comparisons.

    Raises UnsupportedModel and WorkerConfigError.
    """
    started_s = time.monotonic()
    device = resolve_device(engine.device)
    config = read_config(model)
    rehearse(config, max_model_len(model, config))
    base = load_base(model, device)
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
    residency = Residency(adapter_pool)
    loader = AdapterLoader(adapter_pool, residency, fetch, on_gone=cache.drop)
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
    )
    startup_s = {"load": load_s, **runner.startup_s, "ready": time.monotonic() - started_s}
    parts = WorkerParts(
        engine=Engine(runner, loader, load_tokenizer(model.source), engine, deliver, worker_id=worker_id),
        runner=runner,
        cache=cache,
        pool=adapter_pool,
        residency=residency,
        loader=loader,
        startup_s=startup_s,
    )
    logger.info(
        "worker %s: %s on %s in %s, %d KV pages of %d tokens, %d adapter pages of %d bytes; seconds: %s",
        worker_id,
        model.id,
        device,
        base.dtype,
        sizes.num_kv_pages,
        engine.kv_page_tokens,
        adapter_pool.num_pages_total,
        layout.page_bytes,
        ", ".join(f"{part} {seconds:.1f}" for part, seconds in startup_s.items()),
    )
    if device.type == "cuda":
        free, total = (num_bytes / 2**30 for num_bytes in torch.cuda.mem_get_info(device))
        logger.info("worker %s: %.1f of the GPU's %.1f GiB are left", worker_id, free, total)
    return parts
