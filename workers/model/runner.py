"""Runs forward passes: the substituted base, its KV cache and its adapter pool, one batch at a time."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from lorafleet.kernels.segments import Segments
from lorafleet.workers.batch import StepBatch
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.model import attention, lora_layers
from lorafleet.workers.model.geometry import projection_groups
from lorafleet.workers.model.loader import BaseModel
from lorafleet.workers.model.sampler import Chosen, sample, with_logprobs

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2.5e-1}
"""Largest difference from the untouched model's logprobs that rounding explains."""


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

    def __init__(self, base: BaseModel, cache: KVCache, pool: AdapterPool) -> None:
        self.base = base
        self.cache = cache
        self.pool = pool
        self._lora = lora_layers.LoraContext()
        self._attention = attention.AttentionContext(cache)
        self._substitute()
        self._probe()

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns before the step is computed."""
        return self.base.device.type == "cuda"

    @torch.inference_mode()
    def launch(self, batch: StepBatch, previous: StepInFlight | None) -> StepInFlight:
        """Begin one step. Placeholder tokens of the batch are taken from `previous`, which may be in flight."""
        token_ids = batch.token_ids
        if batch.has_pending:
            assert previous is not None
            assert previous.next_token_ids is not None
            is_pending = token_ids < 0
            token_ids = torch.where(
                is_pending, previous.next_token_ids[torch.where(is_pending, -1 - token_ids, 0)], token_ids
            )
        logits = self._forward(batch, token_ids)
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
        sampled = sample(logits[num_prompt_rows:], batch.sampling) if batch.sampled else None
        step = StepInFlight(
            next_token_ids=None if sampled is None else sampled.token_ids,
            sampled=None if sampled is None else sampled.to_host(),
            prompts=None if prompts is None else prompts.to_host(),
            is_done=torch.cuda.Event() if logits.is_cuda else None,  # type: ignore[no-untyped-call]
        )
        if step.is_done is not None:
            step.is_done.record()
        return step

    def _forward(self, batch: StepBatch, token_ids: torch.Tensor) -> torch.Tensor:
        """(num_logits, vocab) logits of the batch's logits rows."""
        self._attention.batch = batch.attention
        self._lora.segments = _if_lora(batch.segments)
        self._lora.logits_segments = _if_lora(batch.logits_segments)
        try:
            output = self.base.model(
                input_ids=token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.logits_rows,
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
        attention.install(model, self._attention)
        logger.info(
            "%s: substituted %s; attention reads pages of %d tokens",
            type(model).__name__,
            ", ".join(f"{count} {name}" for name, count in counts.items()),
            self.cache.page_tokens,
        )

    @torch.inference_mode()
    def _probe(self) -> None:
        """Refuse a base that the substituted model does not compute as transformers does."""
        num_tokens = self.base.probe_token_ids.shape[0]
        device = self.base.device
        pages = self.cache.allocate(-(-num_tokens // self.cache.page_tokens))
        positions = torch.arange(num_tokens, device=device)
        table = torch.tensor([pages], device=device)
        self._attention.batch = attention.AttentionBatch(
            row_pages=table[0][positions // self.cache.page_tokens],
            row_offsets=positions % self.cache.page_tokens,
            query_lengths=[num_tokens],
            context_lengths=torch.tensor([num_tokens], device=device),
            host_context_lengths=[num_tokens],
            block_tables=table,
            num_decodes=0,
        )
        try:
            output = self.base.model(
                input_ids=self.base.probe_token_ids[None], position_ids=positions[None], use_cache=False
            )
        finally:
            self._attention.batch = None
            self.cache.free(pages)
        got, wanted = output.logits[0].float().log_softmax(-1), self.base.probe_logits.log_softmax(-1)
        likely = wanted > np.log(1e-4)
        difference = float((got - wanted).abs()[likely].max())
        tolerance = PROBE_TOLERANCE[self.base.dtype]
        if not difference <= tolerance:
            raise UnsupportedModel(
                f"{type(self.base.model).__name__} computes something that is not supported: a probe's logprobs are "
                f"{difference:.2g} off transformers' own, more than {tolerance:g}"
            )


def _if_lora(segments: Segments) -> Segments | None:
    return segments if segments.has_lora else None
