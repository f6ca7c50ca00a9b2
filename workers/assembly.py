"""Puts a worker's parts together: base, memory, loader, runner, engine. Workers and benchmarks start from here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.workers.adapter_loader import AdapterLoader
from lorafleet.workers.checkpoint import load_tokenizer
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.engine import Delivery, Engine
from lorafleet.workers.group.leader import Group
from lorafleet.workers.group.leading import LeadingCache, LeadingPool
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.residency import Residency
from lorafleet.workers.memory.state_store import StateStore
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model_parts import ModelParts, assemble_model, device_of
from lorafleet.workers.ranks import Ranks
from lorafleet.workers.sizing import compresses_latents

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
    """Seconds of the start: rehearsal, load, and on a GPU compiling, warming up and capturing; `ready`: all of it."""
    group: Group | None
    """The other ranks; None for a worker of one process."""

    def close(self) -> None:
        """End the engine, its threads and the other ranks."""
        self.engine.close()
        if self.group is not None:
            self.runner.graphs.clear()  # they hold collectives of the group, which is to go
            self.group.close()


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

    Starts the other ranks that `engine.tensor_parallel_size` asks for. Without `captures` no step runs as a CUDA graph,
    for comparisons. ranks: this one, the first, among others, which call `assemble_model`, where the caller has them.

    Raises UnsupportedModel and WorkerConfigError.
    """
    started_s = time.monotonic()
    group: Group | None = None
    if engine.tensor_parallel_size == 1 or ranks is not None:
        parts = assemble_model(model, engine, pool, ranks=ranks, captures=captures)
    else:
        group, parts = _assemble_group(model, engine, pool, captures)
    cache = parts.cache
    residency = Residency(parts.pool)
    loader = AdapterLoader(parts.pool, residency, fetch, on_gone=cache.drop)
    startup_s = {**parts.startup_s, "ready": time.monotonic() - started_s}
    _log_start(worker_id, model, engine, parts, startup_s)
    return WorkerParts(
        engine=Engine(
            parts.runner, loader, load_tokenizer(model.source), engine, deliver, worker_id=worker_id, group=group
        ),
        runner=parts.runner,
        cache=cache,
        pool=parts.pool,
        residency=residency,
        loader=loader,
        startup_s=startup_s,
        group=group,
    )


def _log_start(
    worker_id: str, model: ModelConfig, engine: EngineConfig, parts: ModelParts, startup_s: dict[str, float]
) -> None:
    """Say what the worker has, and what its start took."""
    device = parts.base.device
    logger.info(
        "worker %s: %s on %s in %s, %d KV pages of %d tokens, %d adapter pages of %d bytes; seconds: %s",
        worker_id,
        model.id,
        device,
        parts.base.dtype,
        parts.cache.counts.total,
        engine.kv_page_tokens,
        parts.pool.num_pages_total,
        parts.pool.layout.page_bytes,
        ", ".join(f"{part} {seconds:.1f}" for part, seconds in startup_s.items()),
    )
    if parts.runner.states.has_states:
        logger.log(
            logging.INFO if engine.speculation is None else logging.WARNING,
            "worker %s: %s has recurrent layers, which keep %.1f MiB of each sequence in %d slots; without a prefix "
            "cache and without speculation",
            worker_id,
            model.id,
            StateStore.slot_bytes(parts.base.states) / 2**20,
            engine.max_running,
        )
    if device.type == "cuda":
        free, total = (num_bytes / 2**30 for num_bytes in torch.cuda.mem_get_info(device))
        logger.info("worker %s: %.1f of the GPU's %.1f GiB are left", worker_id, free, total)


def _assemble_group(
    model: ModelConfig, engine: EngineConfig, pool: PoolConfig, captures: bool
) -> tuple[Group, ModelParts]:
    """Start the other ranks, and this one beside them. All end if one cannot start."""
    device = device_of(engine, 0)
    compresses_latents(engine, device)  # a refusal need not wait for the others
    group = Group(model, engine, pool, captures=captures)
    with group.starting():
        parts = assemble_model(
            model,
            engine,
            pool,
            ranks=group.connect(device),
            captures=captures,
            agree=group.agree,
            make_cache=LeadingCache,
            make_pool=LeadingPool,
        )
        group.wait_ready()
    assert isinstance(parts.cache, LeadingCache)
    assert isinstance(parts.pool, LeadingPool)
    parts.cache.group = parts.pool.group = group
    return group, parts
