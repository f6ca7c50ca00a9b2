"""Divides a device's free memory between KV pages and adapter pages, by the settings.

Sizes are of one device. The ranks of a worker take the least that any of them has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from lorafleet.kernels.fp8_values import DTYPE as FP8
from lorafleet.workers.config import EngineConfig, PoolConfig
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.shares import Share
from lorafleet.workers.memory.state_store import StateStore
from lorafleet.workers.model.geometry import TORCH_DTYPES
from lorafleet.workers.model.loader import BaseModel
from lorafleet.workers.model.quantisation import MIN_CAPABILITY

CPU_KV_BYTES = 1 << 30
"""Most that `kv_bytes: auto` takes on a CPU."""
CPU_POOL_BYTES = 512 << 20
"""Most that `pool_bytes: auto` takes on a CPU."""
AUTO_ADAPTERS = 64
"""`pool_bytes: auto` takes no more than this many adapters of the largest rank on every module need."""
GPU_POOL_SHARE = 0.35
"""Of the memory left beside the weights, when both sizes are `auto` and there is not enough for all that is wanted."""


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """Sizes of a worker's memories."""

    num_kv_pages: int
    pool_bytes: int


def compresses_latents(engine: EngineConfig, device: torch.device) -> bool:
    """Return True if pages are to keep latents, where there are some. Raises WorkerConfigError if they cannot."""
    size = engine.tensor_parallel_size
    if engine.latent_cache == "compressed" and size > 1:
        raise WorkerConfigError(
            f"worker.latent_cache: compressed is not supported with worker.tensor_parallel_size={size}, where each "
            "device has some of the heads: use latent_cache: auto, or tensor_parallel_size: 1"
        )
    is_automatic = engine.latent_cache == "auto" and device.type == "cuda" and size == 1
    return is_automatic or engine.latent_cache == "compressed"


def kv_dtype(base: BaseModel, engine: EngineConfig) -> torch.dtype:
    """Dtype of keys and values on pages. Raises WorkerConfigError for one that the base or the device does not have."""
    if engine.latent_cache == "compressed" and not base.has_latents:
        raise WorkerConfigError(
            f"worker.latent_cache: compressed needs latent attention, which {type(base.model).__name__} does not have "
            "in a form that is known: use latent_cache: auto"
        )
    if engine.kv_dtype == "fp8" and base.has_latents:
        raise WorkerConfigError(
            "worker.kv_dtype: fp8 is not supported with the compressed cache of latent attention, which takes "
            f"{KVCache.page_bytes(base.layers, 1, TORCH_DTYPES[base.dtype])} bytes a token: use kv_dtype: auto, or "
            "worker.latent_cache: expanded"
        )
    if engine.kv_dtype == "auto":
        return TORCH_DTYPES[base.dtype]
    device = base.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        raise WorkerConfigError(
            f"worker.kv_dtype: fp8 needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later, "
            f"and {torch.cuda.get_device_name(device)} is older: use kv_dtype: auto"
        )
    return FP8


def memory_sizes(base: BaseModel, engine: EngineConfig, pool: PoolConfig) -> MemorySizes:
    """Sizes for this base on its device. Raises WorkerConfigError, naming the setting to change."""
    page_bytes = KVCache.page_bytes(base.layers, engine.kv_page_tokens, kv_dtype(base, engine))
    pages_per_sequence = -(-base.max_model_len // engine.kv_page_tokens)
    # One page beside the sequences': captured graphs' padding rows write to it.
    wanted_kv = page_bytes * (pages_per_sequence * engine.max_running + 1)
    wanted_pool = AUTO_ADAPTERS * _largest_adapter_bytes(base, pool.max_rank)
    set_pool = pool.pool_bytes if pool.max_slots else 0
    if base.device.type == "cuda":
        # One slot beside the sequences': captured graphs' padding rows write to it.
        state_bytes = StateStore.slot_bytes(base.states) * (engine.max_running + 1)
        kv_bytes, pool_bytes = _on_gpu(base.device, engine, set_pool, wanted_kv, wanted_pool, state_bytes)
    else:
        kv_bytes = min(wanted_kv, CPU_KV_BYTES) if engine.kv_bytes == "auto" else engine.kv_bytes
        pool_bytes = min(wanted_pool, CPU_POOL_BYTES) if set_pool == "auto" else set_pool
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if kv_bytes + pool_bytes > there:
            raise WorkerConfigError(
                f"worker.kv_bytes ({kv_bytes / 2**30:.1f} GiB) and adapters.pool_bytes ({pool_bytes / 2**30:.1f} GiB) "
                f"are more than this machine's memory of {there / 2**30:.1f} GiB: lower one of them"
            )
    # A base of recurrent layers alone keeps nothing on its pages.
    num_kv_pages = kv_bytes // page_bytes if page_bytes else pages_per_sequence * engine.max_running + 1
    where = "" if engine.tensor_parallel_size == 1 else f" on each of {engine.tensor_parallel_size} devices"
    if num_kv_pages < pages_per_sequence + 1:
        raise WorkerConfigError(
            f"worker.kv_bytes: {kv_bytes} bytes{where} hold {num_kv_pages} KV pages, but one request of max_model_len="
            f"{base.max_model_len} tokens takes {pages_per_sequence + 1}: raise worker.kv_bytes to "
            f"{page_bytes * (pages_per_sequence + 1)} or lower model.max_model_len"
        )
    return MemorySizes(num_kv_pages, pool_bytes)


def _on_gpu(
    device: torch.device,
    engine: EngineConfig,
    set_pool: int | Literal["auto"],
    wanted_kv: int,
    wanted_pool: int,
    state_bytes: int,
) -> tuple[int, int]:
    free, total = torch.cuda.mem_get_info(device)
    # What the worker may use beside what is taken already: weights, other workers on this GPU, other programs.
    left = int(total * engine.gpu_memory_utilization) - (total - free) - state_bytes
    if set_pool != "auto":
        pages = set_pool
    elif engine.kv_bytes != "auto":
        pages = min(wanted_pool, left - engine.kv_bytes)
    else:
        pages = min(wanted_pool, int(left * GPU_POOL_SHARE))
    kv = min(wanted_kv, left - pages) if engine.kv_bytes == "auto" else engine.kv_bytes
    if (kv <= 0 < wanted_kv) or (pages <= 0 and set_pool != 0) or kv + pages > left:
        size = engine.tensor_parallel_size
        where = "GPU memory" if size == 1 else f"memory on one of the worker's {size} GPUs"
        states = (
            f" and the recurrent states ({state_bytes / 2**30:.1f} GiB for worker.max_running={engine.max_running})"
            if state_bytes
            else ""
        )
        lowered = "one of them or worker.max_running" if state_bytes else "one of them"
        raise WorkerConfigError(
            f"{left / 2**30:.1f} GiB of {where} are left beside the weights{states}, not enough for worker.kv_bytes "
            f"({kv / 2**30:.1f} GiB) and adapters.pool_bytes ({pages / 2**30:.1f} GiB): lower {lowered}, raise "
            f"worker.gpu_memory_utilization ({engine.gpu_memory_utilization}) or worker.tensor_parallel_size ({size}), "
            "or take a smaller base"
        )
    return kv, pages


def _largest_adapter_bytes(base: BaseModel, max_rank: int) -> int:
    """Bytes of the part that this rank would hold."""
    whole = {name: Share.whole(shape) for name, shape in base.geometry.modules.items()}
    elements = sum(share.shape.num_elements(max_rank) for share in (whole | dict(base.shares)).values())
    return elements * TORCH_DTYPES[base.dtype].itemsize
