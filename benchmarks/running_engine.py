"""An engine in this process, as workers run it, and the times of what it is asked."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from random_models import MAX_MODEL_LEN, RandomAdapters

from lorafleet.workers.assembly import WorkerParts, assemble
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.engine import Delivery
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams, StructuredOutputs

Figures = dict[str, float]
GREEDY = SamplingParams(temperature=0.0)
MAX_SECONDS = 300.0
"""A run that takes longer is stuck."""


@dataclass(slots=True)
class Inbox:
    """Takes the engine's deliveries and keeps when they came."""

    times_s: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    open_ids: set[str] = field(default_factory=set)
    is_done: threading.Event = field(default_factory=threading.Event)

    def expect(self, ids: Iterable[str]) -> None:
        """Forget what was; wait for these requests."""
        self.times_s, self.num_tokens = {}, 0
        self.open_ids = set(ids)
        self.is_done.clear()

    def take(self, deliveries: list[Delivery]) -> None:
        """On the engine's thread."""
        now = time.perf_counter()
        for request_id, item in deliveries:
            if isinstance(item, GenerateDelta):
                over = item.finish_reason is not None
                if request_id in self.open_ids:
                    self.num_tokens += len(item.token_ids)
                    self.times_s.setdefault(request_id, []).append(now)
            else:
                self.errors.append(repr(item))
                over = True
            if over:
                self.open_ids.discard(request_id)
        if not self.open_ids:
            self.is_done.set()


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """A started engine and the adapters that it can fetch."""

    parts: WorkerParts
    inbox: Inbox
    adapters: RandomAdapters

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        version: str | None,
        num_output: int,
        outputs: StructuredOutputs | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> None:
        """One request of exactly so many tokens, if `outputs` allows so many."""
        own = {"max_tokens": num_output, "ignore_eos": True, "structured_outputs": outputs}
        sampling = sampling.model_copy(update=own)
        self.parts.engine.submit(EngineRequest(request_id, version, tuple(prompt), sampling))

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        versions: Sequence[str | None],
        num_output: int,
        per_second: float | None = None,
        outputs: Sequence[StructuredOutputs | None] = (),
        sampling: SamplingParams = GREEDY,
    ) -> Figures:
        """Submit everything at once, or `per_second` requests a second, and wait for the last token.

        outputs: what the first answers must be; the others are free. `free_gap_ms_p50` is of those.
        """
        ids = [f"{i}-{time.monotonic_ns()}" for i in range(len(prompts))]
        self.inbox.expect(ids)
        steps, loads = self.parts.engine.stats.num_steps, self.parts.residency.snapshot().loads
        moved = self.adapters.fetched_bytes
        gc.collect()
        start = time.perf_counter()
        sent_s = {}
        for i, (request_id, prompt, version) in enumerate(zip(ids, prompts, versions, strict=True)):
            if per_second is not None:
                time.sleep(max(0.0, start + i / per_second - time.perf_counter()))
            sent_s[request_id] = time.perf_counter() if per_second is not None else start
            self.submit(request_id, prompt, version, num_output, outputs[i] if i < len(outputs) else None, sampling)
        if not self.inbox.is_done.wait(MAX_SECONDS):
            raise TimeoutError(f"{len(self.inbox.open_ids)} requests never ended; {self.inbox.errors[:3]}")
        seconds = time.perf_counter() - start
        if self.inbox.errors:
            raise RuntimeError(f"{len(self.inbox.errors)} requests failed: {self.inbox.errors[:3]}")
        first_ms = np.array([self.inbox.times_s[request_id][0] - sent_s[request_id] for request_id in ids]) * 1e3
        gaps_ms = np.concatenate([np.diff(self.inbox.times_s[request_id]) for request_id in ids]) * 1e3
        free_ms = np.concatenate([np.diff(self.inbox.times_s[request_id]) for request_id in ids[len(outputs) :]]) * 1e3
        loads = self.parts.residency.snapshot().loads - loads
        return {
            "seconds": seconds,
            "output_tokens": self.inbox.num_tokens,
            "output_tokens_per_s": self.inbox.num_tokens / seconds,
            "steps": self.parts.engine.stats.num_steps - steps,
            "loads": loads,
            "loads_per_s": loads / seconds,
            "bytes_moved": self.adapters.fetched_bytes - moved,
            "first_token_ms_p50": float(np.median(first_ms)),
            "first_token_ms_p99": float(np.quantile(first_ms, 0.99)),
            "gap_ms_p50": float(np.median(gaps_ms)) if gaps_ms.size else 0.0,
            "gap_ms_p99": float(np.quantile(gaps_ms, 0.99)) if gaps_ms.size else 0.0,
            "free_gap_ms_p50": float(np.median(free_ms)) if free_ms.size else 0.0,
        }


@contextmanager
def running_engine(
    base: Path,
    adapters: RandomAdapters,
    engine: EngineConfig,
    pool: PoolConfig,
    load: Literal["weights", "dummy"] = "dummy",
    quantization: Literal["none", "fp8"] = "none",
    inbox: Inbox | None = None,
    max_model_len: int = MAX_MODEL_LEN,
) -> Iterator[RunningEngine]:
    """Start one, and end it. `inbox`: another than its own."""
    inbox = inbox or Inbox()
    model = ModelConfig(
        id="base",
        source=str(base),
        dtype="bfloat16",
        load=load,
        max_model_len=max_model_len,
        quantization=quantization,
    )
    parts = assemble(worker_id="bench", model=model, engine=engine, pool=pool, fetch=adapters.fetch, deliver=inbox.take)
    parts.engine.start()
    try:
        yield RunningEngine(parts, inbox, adapters)
    finally:
        parts.close()
