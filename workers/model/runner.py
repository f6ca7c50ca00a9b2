"""Runs forward passes: the substituted base, its KV cache and its adapter pool, one batch at a time."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.kernels.launching import compiled_ahead
from lorafleet.kernels.segments import Segments
from lorafleet.workers.batch import StepBatch, StepInputs, blank_batch, blank_prompt, most_chunks
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.model import attention, fused_layers, lora_layers, norm_layers
from lorafleet.workers.model.cuda_graphs import StepGraph, capture, kernel_shapes
from lorafleet.workers.model.geometry import projection_groups
from lorafleet.workers.model.loader import BaseModel
from lorafleet.workers.model.sampler import Chosen, sample, with_logprobs

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1.5e-1}
"""Mean difference from the untouched model's logprobs, over the likeliest tokens, that rounding explains."""
PROBE_TOP = 32


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that the device may still be computing."""

    next_token_ids: torch.Tensor | None
    """(num_sampled,) int64 on the device: what the following step takes for its placeholders."""
    sampled: Chosen | None
    """On the host once `wait` returns; one row for each of the batch's `sampled` sequences."""
    prompts: Chosen | None
    """The same for the batch's `prompts`, one row a position."""
    is_done: torch.cuda.Event | None

    def wait(self) -> None:
        """Block until the host's copies are complete: the step's only synchronisation."""
        if self.is_done is not None:
            self.is_done.synchronize()


class ModelRunner:
    """A base model whose leaves know about adapters and whose attention knows about pages."""

    def __init__(
        self,
        base: BaseModel,
        cache: KVCache,
        pool: AdapterPool,
        *,
        graph_sizes: tuple[int, ...] = (),
        max_batch_tokens: int = 2048,
    ) -> None:
        """`graph_sizes`, rising: rows of the decode batches to capture; none on a CPU."""
        self.base = base
        self.cache = cache
        self.pool = pool
        self._lora = lora_layers.LoraContext(pool.extras)
        self._attention = attention.AttentionContext(cache)
        self._graphs: dict[tuple[int, bool], StepGraph] = {}
        self._kinds = (False, True) if pool.num_slots else (False,)
        """Whether a batch may have LoRA work."""
        self.stages_s: dict[str, float] = {}
        """Seconds of what was done at start."""
        self.max_pages = -(-(base.max_model_len + 1) // cache.page_tokens)
        """KV pages of the longest sequence."""
        self.graph_sizes = graph_sizes if base.device.type == "cuda" else ()
        self.null_pages = cache.allocate(1) if self.graph_sizes else []
        """Takes the keys and values of padding rows; never given back. None where nothing is padded."""
        self._substitute()
        self._probe()
        if self.graph_sizes:
            self._warm_up(max_batch_tokens)
            self._capture_graphs()

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns before the step is computed."""
        return self.base.device.type == "cuda"

    @torch.inference_mode()
    def launch(self, batch: StepBatch, previous: StepInFlight | None) -> StepInFlight:
        """Begin one step. Placeholder tokens of the batch are taken from `previous`, which may be in flight."""
        packed = self._pinned(batch.packed)
        if batch.graph_size is None:
            inputs = batch.view(packed.to(self.base.device, non_blocking=True))
            self._fill_pending(inputs, batch, previous)
            logits = self._forward(inputs)
        else:
            graph = self._graphs[batch.graph_size, batch.segments.num_lora_chunks > 0]
            graph.packed.copy_(packed, non_blocking=True)
            self._fill_pending(graph.inputs, batch, previous)
            logits = graph.replay()
            if batch.wanted_rows is not None:
                logits = logits[self._pinned(batch.wanted_rows).to(self.base.device, non_blocking=True)]
        num_prompt_rows = sum(count for _, _, count in batch.prompts)
        prompts = None
        if num_prompt_rows:
            targets = [
                token
                for sequence, start, count in batch.prompts
                for token in sequence.token_ids[start + 1 : start + 1 + count]
            ]
            num_top = max(sequence.request.sampling.logprobs or 0 for sequence, _, _ in batch.prompts)
            prompts = with_logprobs(logits[:num_prompt_rows], torch.tensor(targets, device=logits.device), num_top)
        sampled = (
            sample(logits[num_prompt_rows : num_prompt_rows + len(batch.sampled)], batch.sampling)
            if batch.sampled
            else None
        )
        step = StepInFlight(
            next_token_ids=None if sampled is None else sampled.token_ids,
            sampled=None if sampled is None else sampled.to_host(),
            prompts=None if prompts is None else prompts.to_host(),
            is_done=torch.cuda.Event() if logits.is_cuda else None,  # type: ignore[no-untyped-call]
        )
        if step.is_done is not None:
            step.is_done.record()
        return step

    def _pinned(self, array: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        """The array as a host tensor from which a copy to the device need not wait."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.base.device.type == "cuda" else tensor

    def _fill_pending(self, inputs: StepInputs, batch: StepBatch, previous: StepInFlight | None) -> None:
        """Put the tokens that the step in flight chooses in the places of their placeholders."""
        if batch.has_pending:
            assert previous is not None
            assert previous.next_token_ids is not None
            token_ids = inputs.token_ids
            chosen = previous.next_token_ids[(-1 - token_ids).clamp_(min=0)]
            torch.where(token_ids < 0, chosen.to(token_ids.dtype), token_ids, out=token_ids)

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """(num_logits, vocab) logits of the logits rows."""
        self._attention.batch = inputs.attention
        self._lora.segments = _if_lora(inputs.segments)
        self._lora.logits_segments = _if_lora(inputs.logits_segments)
        try:
            output = self.base.model(
                input_ids=inputs.token_ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.logits_rows,
            )
        finally:
            self._attention.batch = None
            self._lora.segments = self._lora.logits_segments = None
        logits: torch.Tensor = output.logits[0]
        return logits

    def _substitute(self) -> None:
        model, geometry = self.base.model, self.base.geometry
        counts: Counter[str] = Counter()
        linear = [name for name, shape in geometry.modules.items() if shape.kind == "linear"]
        for group in projection_groups(linear):
            lora_layers.substitute_projections(model, group, self.pool.weights(group), self._lora)
            counts["+".join(name.rpartition(".")[2] for name in group)] += 1
        for name, shape in geometry.modules.items():
            if shape.kind == "embedding":
                lora_layers.substitute_embedding(model, name, self.pool.embedding_weights(name), self._lora)
                counts[name.rpartition(".")[2]] += 1
        norm_layers.substitute_norms(model, geometry.vectors, self._lora)
        attention.install(model, self._attention)
        why_not_fused = fused_layers.substitute(model, self._attention)
        logger.info(
            "%s: substituted %s; attention reads pages of %d tokens; %s",
            type(model).__name__,
            ", ".join(f"{count} {name}" for name, count in counts.items()),
            self.cache.page_tokens,
            "fused layers" if why_not_fused is None else f"transformers' own layers ({why_not_fused})",
        )

    @torch.inference_mode()
    def _warm_up(self, max_batch_tokens: int) -> None:
        """Have kernels compiled, and run prompts of the lengths that no graph serves: no request waits for either.

        Raises WorkerConfigError when the largest does not fit the memory that is left.
        """
        started_s = time.monotonic()
        with compiled_ahead(len(os.sched_getaffinity(0))):
            for chunk_length, max_chunks in kernel_shapes(max_batch_tokens, self.pool.num_slots):
                blank = blank_batch(
                    min(max_chunks, self.graph_sizes[-1]),
                    max_pages=self.max_pages,
                    null_page=self.null_pages[0],
                    has_lora=self._kinds[-1],
                    max_chunks=max_chunks,
                    chunk_length=chunk_length,
                )
                self._forward_blank(blank, max_batch_tokens)
            prompt = blank_prompt(
                2,
                page_tokens=self.cache.page_tokens,
                null_page=self.null_pages[0],
                has_lora=self._kinds[-1],
                chunk_length=16,
            )
            self._forward_blank(prompt, max_batch_tokens)
        self.stages_s["compile"] = time.monotonic() - started_s
        logger.info("compiled kernels, %.1f s", self.stages_s["compile"])
        started_s = time.monotonic()
        sizes = [n for n in (self.graph_sizes[-1] + 1, 1024, 2048, 4096) if n < max_batch_tokens] + [max_batch_tokens]
        variants = [(n, 128, has_lora) for n in sizes for has_lora in self._kinds]
        variants += [(sizes[0], chunk_length, self._kinds[-1]) for chunk_length in (16, 32, 64)]
        for num_rows, chunk_length, has_lora in variants:
            batch = blank_prompt(
                num_rows,
                page_tokens=self.cache.page_tokens,
                null_page=self.null_pages[0],
                has_lora=has_lora,
                chunk_length=chunk_length,
            )
            self._forward_blank(batch, max_batch_tokens)
        self.stages_s["warm up"] = time.monotonic() - started_s
        logger.info("warmed up with prompts of %s tokens, %.1f s", sizes, self.stages_s["warm up"])

    def _forward_blank(self, batch: StepBatch, max_batch_tokens: int) -> None:
        try:
            self._forward(batch.view(torch.from_numpy(batch.packed).to(self.base.device)))
            torch.cuda.synchronize(self.base.device)
        except torch.OutOfMemoryError as error:
            raise WorkerConfigError(
                f"no memory is left for a step of {batch.num_rows} tokens: lower worker.max_batch_tokens "
                f"({max_batch_tokens}), worker.kv_bytes, adapters.pool_bytes or worker.gpu_memory_utilization"
            ) from error

    @torch.inference_mode()
    def _capture_graphs(self) -> None:
        """Capture decode steps of every size, largest first, so that the smaller ones reuse its memory."""
        started_s = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.graph_sizes):
            for has_lora in reversed(self._kinds):
                blank = blank_batch(
                    size,
                    max_pages=self.max_pages,
                    null_page=self.null_pages[0],
                    has_lora=has_lora,
                    max_chunks=most_chunks(size, self.pool.num_slots),
                )
                self._graphs[size, has_lora] = capture(self._forward, blank, self.base.device, pool)
            logger.info("captured a decode step of %d rows, %.1f s", size, time.monotonic() - started_s)
        self.stages_s["capture"] = time.monotonic() - started_s

    @torch.inference_mode()
    def _probe(self) -> None:
        """Refuse a base that the substituted model does not compute as transformers does.

        It computes the prompt in parts, the last one token long, so that what came before must come from the cache.
        """
        name, num_tokens = type(self.base.model).__name__, len(self.base.probe_token_ids)
        pages = self.cache.allocate(-(-num_tokens // self.cache.page_tokens))
        bounds = (0, num_tokens // 2, num_tokens - 1, num_tokens)
        try:
            parts = [self._probe_part(pages, start, end) for start, end in pairwise(bounds)]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"{name} cannot be computed on pages: {error}") from error
        finally:
            self._attention.batch = None
            self.cache.free(pages)
        got, wanted = torch.cat(parts).float().log_softmax(-1), self.base.probe_logits.log_softmax(-1)
        likely = wanted.topk(min(PROBE_TOP, wanted.shape[-1]), dim=-1).indices
        difference = float((got - wanted).abs().gather(-1, likely).mean())
        tolerance = PROBE_TOLERANCE[self.base.dtype]
        if not difference <= tolerance:
            raise UnsupportedModel(
                f"{name} computes something that is not supported: a probe's logprobs are {difference:.2g} off "
                f"transformers' own in the mean, more than {tolerance:g}"
            )

    def _probe_part(self, pages: list[int], start: int, end: int) -> torch.Tensor:
        """(end - start, vocab) logits of a part of the probe, whose earlier tokens are in the cache."""
        device, num_rows = self.base.device, end - start
        positions = torch.arange(start, end, dtype=torch.int32, device=device)
        table = torch.tensor([pages], dtype=torch.int32, device=device)
        self._attention.batch = attention.AttentionBatch(
            row_pages=table[0][positions // self.cache.page_tokens],
            row_offsets=positions % self.cache.page_tokens,
            query_indptr=torch.tensor([0, num_rows], dtype=torch.int32, device=device),
            query_lengths=[num_rows],
            context_lengths=torch.tensor([end], dtype=torch.int32, device=device),
            host_context_lengths=[end],
            block_tables=table,
            num_decodes=int(num_rows == 1),
        )
        output = self.base.model(
            input_ids=self.base.probe_token_ids[None, start:end], position_ids=positions[None], use_cache=False
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def _if_lora(segments: Segments) -> Segments | None:
    return segments if segments.has_lora else None
