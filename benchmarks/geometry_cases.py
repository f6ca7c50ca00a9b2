"""Cases of `engine.py` for bases of other geometries than Llama's: a mixture of experts, Gemma 3 and latent attention.

A decode step is held against its floor: the bytes that it has to read, over the copy bandwidth of the same GPU. Of
experts those count that its rows are given to. A step of prompts is held against the rate of a large product.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from engine_cases import PAGE_ROUND, RANK, Case, Lab, Named
from random_models import GEOMETRIES, RandomAdapters, kv_bytes
from running_engine import Figures, RunningEngine, running_engine

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.kernels.segments import BASE_SLOT
from lorafleet.workers.config import PoolConfig
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.state_store import NULL_SLOT
from lorafleet.workers.model.expert_layers import LoraExperts
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.step.layout import Layout
from lorafleet.workers.step.message import StepMessage
from lorafleet.workers.step.sampling import NO_SAMPLING

EXPERT_RANK = 4
"""Of adapters on experts. At rank 16 the memory of one GPU does not hold 64 of them beside the mixture."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
SEQUENCES = 64
PROMPT = 512
"""Tokens of each prompt of a step."""


@dataclass(slots=True)
class TwoKinds:
    """Adapters on attention, and those on experts, whose names begin with x."""

    attention: RandomAdapters
    experts: RandomAdapters

    @property
    def fetched_bytes(self) -> int:
        return self.attention.fetched_bytes + self.experts.fetched_bytes

    def fetch(self, version: str) -> AdapterWeights:
        """The weights of a version."""
        return (self.experts if version.startswith("x") else self.attention).fetch(version)


@dataclass(slots=True)
class _Meter:
    """Counts the experts that the last rows of prompts are given to, as the rows of a decode step would be."""

    length: int
    """Of each prompt."""
    shares: list[float] = field(default_factory=list)
    """Of each layer: experts that are hit, of all."""

    def note(self, module: LoraExperts, args: tuple[torch.Tensor, ...]) -> None:
        """A hook ahead of experts."""
        hit = torch.unique(args[1][self.length - 1 :: self.length]).numel()
        self.shares.append(hit / module.num_experts)


@cache
def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and bf16 operations a second of a large product."""
    if not torch.cuda.is_available():
        return 1e10, 1e11
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b, c = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    copy_s = min(_seconds(lambda: target.copy_(source)) for _ in range(10))
    product_s = min(_seconds(lambda: torch.mm(a, b, out=c)) for _ in range(10))
    return 2 * source.nbytes / copy_s, 2 * 8192**3 / product_s


def _seconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def _engine(lab: Lab, *, max_batch_tokens: int | None = None) -> RunningEngine:
    """The engine of a process, with room for 64 adapters of each kind. Started once."""
    if "geometry" not in lab.started:
        ceilings()  # while memory is free
        work, shape = lab.work, GEOMETRIES[lab.geometry]
        is_mixture = "num_experts" in shape
        attention = RandomAdapters(lab.base, targets=ATTENTION)
        experts = RandomAdapters(lab.base, targets=("gate_up_proj", "down_proj") if is_mixture else ())
        num_bytes = work.adapters * (attention.num_bytes(RANK) + 1.3 * experts.num_bytes(EXPERT_RANK))
        pool_bytes = int(PAGE_ROUND * num_bytes) + (64 << 20)
        pool = PoolConfig(max_rank=RANK, max_slots=3 * work.adapters, pool_bytes=pool_bytes)
        num_sequences = work.requests if is_mixture else work.adapters
        num_tokens = num_sequences * (work.prompt + work.output + 32) + max(8192, work.max_batch_tokens)
        config = lab.config(
            prefix_cache="off",
            kv_bytes=kv_bytes(lab.geometry, num_tokens),
            max_running=min(work.max_running, num_sequences),
            **({} if max_batch_tokens is None else {"max_batch_tokens": max_batch_tokens}),
        )
        adapters = TwoKinds(attention, experts)
        context = running_engine(lab.base, adapters, config, pool)  # type: ignore[arg-type]
        engine = lab.started["geometry"] = lab.stack.enter_context(context)
        for name, router in engine.parts.runner.base.model.named_parameters():
            if name.endswith(".own_weight"):  # made up, it may be zero, and all rows would go to the same experts
                router.data.normal_(0, 0.02)
    return lab.started["geometry"]


# --- a mixture ---


def moe_start(lab: Lab) -> Named:
    yield "moe_start", _engine(lab).parts.startup_s


def moe_decode_base(lab: Lab) -> Named:
    yield from _decode(lab, "moe_decode_base", None)


def moe_decode_lora64(lab: Lab) -> Named:
    yield from _decode(lab, "moe_decode_lora64", f"a{{}}-r{RANK}")


def moe_decode_experts64(lab: Lab) -> Named:
    yield from _decode(lab, "moe_decode_experts64", f"x{{}}-r{EXPERT_RANK}")


def moe_prefill(lab: Lab) -> Named:
    """One step of 16 prompts of 512 tokens, kernel by kernel, against the rate of a large product."""
    runner, work = _engine(lab).parts.runner, lab.work
    length = min(PROMPT, work.prompt)
    rows = min(8192, work.max_batch_tokens // length * length)
    for _ in range(lab.repeats + 1):
        with _step(lab, runner, rows // length, length) as message:
            seconds = _seconds(lambda message=message: runner.logits(message))  # type: ignore[misc]
    flop = 2 * rows * _active_weights(lab, runner)
    rate = ceilings()[1]
    figures = {"rows": rows, "seconds": seconds, "tflop_s": flop / seconds / 1e12}
    yield "moe_prefill", {**figures, "of_bf16_rate": flop / seconds / rate, "bf16_tflop_s": rate / 1e12}


def moe_base(lab: Lab) -> Named:
    yield from _throughput(lab, "moe_base", None)


def moe_lora64(lab: Lab) -> Named:
    yield from _throughput(lab, "moe_lora64", f"a{{}}-r{RANK}")


def moe_experts64(lab: Lab) -> Named:
    yield from _throughput(lab, "moe_experts64", f"x{{}}-r{EXPERT_RANK}")


# --- other attention ---


def gemma_start(lab: Lab) -> Named:
    yield "gemma_start", _engine(lab, max_batch_tokens=lab.work.adapters).parts.startup_s


def latent_start(lab: Lab) -> Named:
    yield "latent_start", _engine(lab, max_batch_tokens=lab.work.adapters).parts.startup_s


def gemma_decode(lab: Lab) -> Named:
    yield from _decode(lab, "gemma_decode", None, _engine(lab, max_batch_tokens=lab.work.adapters))


def latent_decode(lab: Lab) -> Named:
    yield from _decode(lab, "latent_decode", None, _engine(lab, max_batch_tokens=lab.work.adapters))


def latent_decode_lora64(lab: Lab) -> Named:
    engine = _engine(lab, max_batch_tokens=lab.work.adapters)
    yield from _decode(lab, "latent_decode_lora64", f"a{{}}-r{RANK}", engine)


def _throughput(lab: Lab, case: str, name: str | None) -> Named:
    engine, work = _engine(lab), lab.work
    versions = [name.format(i % work.adapters) if name else None for i in range(work.requests)]
    engine.run(lab.prompts[: 2 * work.adapters], versions[: 2 * work.adapters], 2)
    for _ in range(lab.repeats):
        yield case, engine.run(lab.prompts, versions, work.output)


def _decode(lab: Lab, case: str, name: str | None, engine: RunningEngine | None = None) -> Named:
    """Steps of 64 short sequences."""
    engine, work = engine or _engine(lab), lab.work
    count, output = min(SEQUENCES, work.adapters), work.decode_output // 2
    prompts = [prompt[:16] for prompt in (lab.prompts * count)[:count]]
    versions = [name.format(i) if name else None for i in range(count)]
    engine.run(prompts, versions, 2)
    floor = _floor(lab, engine.parts.runner, count, 16 + output // 2)
    for _ in range(lab.repeats):
        figures = engine.run(prompts, versions, output)
        yield case, {**figures, **floor, "of_floor": figures["gap_ms_p50"] / floor["floor_ms"]}


def _floor(lab: Lab, runner: ModelRunner, num_rows: int, context: int) -> Figures:
    """Milliseconds that a decode step's bytes take: weights, the experts that are hit, keys and values."""
    length = 16
    meter = _Meter(length)
    layers = [module for module in runner.base.model.modules() if isinstance(module, LoraExperts)]
    hooks = [layer.register_forward_pre_hook(meter.note) for layer in layers]
    try:
        with _step(lab, runner, num_rows, length) as message:
            runner.logits(message)
    finally:
        for hook in hooks:
            hook.remove()
    share = np.mean(meter.shares) if layers else 1.0
    # Of latent attention that is what pages keep: latents, or the keys and values of all heads.
    of_token = KVCache.page_bytes(runner.base.layers, 1, torch.bfloat16)
    num_bytes = 2.0 * _weights(runner, share) + num_rows * context * of_token
    figures = {"floor_ms": num_bytes / ceilings()[0] * 1e3, "floor_gb": num_bytes / 1e9}
    return {**figures, "experts_hit": float(share), "copy_tb_s": ceilings()[0] / 1e12}


def _weights(runner: ModelRunner, share: float) -> float:
    """Elements of all matrices that a step multiplies with, of experts that share."""
    return sum(
        shape.in_dim * shape.out_dim * shape.num_experts * (share if shape.kind == "experts" else 1.0)
        for shape in runner.base.geometry.modules.values()
        if shape.kind != "embedding"
    )


def _active_weights(lab: Lab, runner: ModelRunner) -> float:
    """Elements of the matrices that one row is multiplied with, but for the head, which few rows come to."""
    shape = GEOMETRIES[lab.geometry]
    head = shape["hidden_size"] * shape["vocab_size"]
    return _weights(runner, shape["num_experts_per_tok"] / shape["num_experts"]) - head


@contextmanager
def _step(lab: Lab, runner: ModelRunner, num_sequences: int, length: int) -> Iterator[StepMessage]:
    """Prompts of random tokens, of the base, with the logits of the last row of each. Frees its pages at the end."""
    page_tokens = runner.cache.page_tokens
    pages = runner.cache.allocate(num_sequences * -(-length // page_tokens))
    tables = np.array(pages, dtype=np.int32).reshape(num_sequences, -1)
    rows, positions = num_sequences * length, np.tile(np.arange(length), num_sequences)
    layout = Layout(
        token_ids=np.array(lab.tokens(rows)),
        positions=positions,
        row_pages=tables[:, np.arange(length) // page_tokens].ravel(),
        row_offsets=positions % page_tokens,
        row_slots=np.full(rows, BASE_SLOT, dtype=np.int32),
        query_lengths=np.full(num_sequences, length),
        context_lengths=np.full(num_sequences, length),
        tables=tables,
        logits_rows=np.arange(length - 1, rows, length),
        targets=np.zeros(0, dtype=np.int64),
        state_slots=np.full(num_sequences, NULL_SLOT),
    )
    try:
        yield layout.pack(
            form=None,
            chunk_length=None,
            max_chunks=None,
            pass_rows=(runner.pass_rows[0], max(runner.pass_rows[0], num_sequences)),
            num_sampled=(),
            num_prompt_tops=0,
            sampling=NO_SAMPLING,
        )
    finally:
        runner.cache.free(pages)


PROCESSES: dict[str, tuple[str, tuple[Case, ...]]] = {
    "moe": (
        "qwen3-30b-a3b",
        (
            moe_start,
            moe_decode_base,
            moe_decode_lora64,
            moe_decode_experts64,
            moe_prefill,
            moe_base,
            moe_lora64,
            moe_experts64,
        ),
    ),
    "gemma": ("gemma3-27b", (gemma_start, gemma_decode)),
    "latent": ("deepseek-v2-lite", (latent_start, latent_decode, latent_decode_lora64)),
}
"""As `engine_cases.PROCESSES`."""
