"""Runs forward passes: the substituted base, its KV cache and its adapter pool, one batch at a time."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from lorafleet.kernels.launching import compiled_ahead
from lorafleet.kernels.reference import EXACT_ROWS
from lorafleet.kernels.segments import Segments
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.model import fused_layers, lora_layers, norm_layers, paged_attention, probe
from lorafleet.workers.model.cuda_graphs import StepGraph, capture, kernel_shapes
from lorafleet.workers.model.geometry import projection_groups
from lorafleet.workers.model.loader import BaseModel
from lorafleet.workers.model.logits import BodyOnce
from lorafleet.workers.model.row_norms import RowNorms
from lorafleet.workers.model.sampler import Chosen, Sampler, with_logprobs
from lorafleet.workers.step.batch import StepInputs
from lorafleet.workers.step.forms import GraphForm, forms_with_extras
from lorafleet.workers.step.layout import blank_batch, blank_prompt, chunk_bounds
from lorafleet.workers.step.message import StepHeader, StepMessage
from lorafleet.workers.step.passes import LogitsPass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that the device may still be computing."""

    next_token_ids: torch.Tensor | None
    """(num_sampled_rows,) int64 on the device: what the following step takes for its placeholders."""
    sampled: Chosen | None
    """On the host once `wait` returns; one row for each row of the message that is to be sampled."""
    prompts: Chosen | None
    """The same for its rows that give logprobs of prompts."""
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
        max_pages: int,
        graph_forms: tuple[GraphForm, ...] = (),
        max_batch_tokens: int = 2048,
        max_pass_rows: int = 512,
        is_probed: bool = True,
    ) -> None:
        """`max_pages`: KV pages of the longest sequence. `graph_forms`, rising: of the batches to capture; none on a
        CPU. `max_pass_rows`: rows whose logits exist at once. Raises UnsupportedModel unless the base answers as
        transformers does, if it `is_probed`.
        """
        self.base = base
        self.cache = cache
        self.pool = pool
        self._lora = lora_layers.LoraContext(pool.extras, resident_vocabularies=pool.vocabularies)
        self._attention = paged_attention.AttentionContext(cache, base.calls)
        self._sampler = Sampler()
        self._graphs: dict[tuple[GraphForm, int], StepGraph] = {}
        """By `StepHeader.graph_key`."""
        self._kinds = (False, True) if pool.num_slots else (False,)
        """Whether a batch may have LoRA work."""
        self.stages_s: dict[str, float] = {}
        """Seconds of what was done at start."""
        self.max_pages = max_pages
        self.graph_forms = graph_forms if base.device.type == "cuda" else ()
        self.extra_forms = forms_with_extras(self.graph_forms) if pool.num_slots else ()
        """Captured, too, for batches with extras."""
        self.null_pages = cache.allocate(1) if self.graph_forms else []
        """Takes the keys and values of padding rows; never given back. None where nothing is padded."""
        self.pass_rows = 1 if base.device.type == "cuda" else EXACT_ROWS, max_pass_rows
        """Fewest and most rows of a pass over the head. On a CPU a row's bits do not depend on the passes."""
        self.is_fused = False
        """Whether fused layers compute the base."""
        self._substitute()
        pool.row_norms = RowNorms(base.model)
        self.body = BodyOnce(base.model)
        """Computes what lies below the head."""
        if is_probed:
            probe.check(self)
        if self.graph_forms:
            self._warm_up(max_batch_tokens)
            self._capture_graphs()

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns before the step is computed."""
        return self.base.device.type == "cuda"

    @torch.inference_mode()
    def logits(self, message: StepMessage) -> list[torch.Tensor]:
        """(rows, vocab) logits of each pass of a step, computed at once and without a graph."""
        inputs = message.view(torch.from_numpy(message.packed).to(self.base.device))
        with self._step(inputs):
            return [self._logits(inputs, each) for each in inputs.passes]

    @torch.inference_mode()
    def launch(self, message: StepMessage, previous: StepInFlight | None) -> StepInFlight:
        """Begin one step. Placeholder tokens of the message are taken from `previous`, which may be in flight."""
        header = message.header
        packed = torch.from_numpy(message.packed)
        if header.form is None:
            inputs = message.view(self._own(packed))
            self._fill_pending(inputs, header, previous)
            with self._step(inputs):
                parts = [
                    self._choose(self._logits(inputs, each), message, shape.first_own, inputs.targets)
                    for shape, each in zip(header.passes, inputs.passes, strict=True)
                ]
        else:
            graph = self._graphs[header.graph_key]
            graph.packed.copy_(self._pinned(packed), non_blocking=True)
            self._fill_pending(graph.inputs, header, previous)
            logits = graph.replay()
            parts = [self._choose(logits, message, 0, graph.inputs.targets)]
        prompts = Chosen.joined([part for part, _ in parts if part is not None])
        sampled = Chosen.joined([part for _, part in parts if part is not None])
        step = StepInFlight(
            next_token_ids=None if sampled is None else sampled.token_ids,
            sampled=None if sampled is None else sampled.to_host(),
            prompts=None if prompts is None else prompts.to_host(),
            is_done=torch.cuda.Event() if self.base.device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        )
        if step.is_done is not None:
            step.is_done.record()
        return step

    def _choose(
        self, logits: torch.Tensor, message: StepMessage, first: int, targets: torch.Tensor
    ) -> tuple[Chosen | None, Chosen | None]:
        """What the logits of a pass say, of prompts and of rows to sample.

        logits: (rows, vocab), of the step's logits rows from `first` on; padding may follow the last. targets: as in
        `StepInputs`.
        """
        header = message.header
        num_prompt_rows = header.num_prompt_rows
        last = min(first + len(logits), num_prompt_rows + header.num_sampled_rows)
        middle = min(max(first, num_prompt_rows), last)
        prompts = sampled = None
        if first < middle:
            prompts = with_logprobs(logits[: middle - first], targets[first:middle].long(), header.num_prompt_tops)
        if middle < last:
            sampling = message.sampling.part(middle - num_prompt_rows, last - num_prompt_rows)
            sampled = self._sampler.sample(logits[middle - first : last - first], sampling)
        return prompts, sampled

    def _own(self, packed: torch.Tensor) -> torch.Tensor:
        """A copy where the model is, which may be written to: the message stays as it came."""
        if self.base.device.type == "cpu":
            return packed.clone()
        return self._pinned(packed).to(self.base.device, non_blocking=True)

    def _pinned(self, packed: torch.Tensor) -> torch.Tensor:
        """The host tensor as one from which a copy to the device need not wait."""
        return packed.pin_memory() if self.base.device.type == "cuda" else packed

    def _fill_pending(self, inputs: StepInputs, header: StepHeader, previous: StepInFlight | None) -> None:
        """Put the tokens that the step in flight chooses in the places of their placeholders."""
        if header.has_pending:
            assert previous is not None
            assert previous.next_token_ids is not None
            token_ids = inputs.token_ids
            chosen = previous.next_token_ids[(-1 - token_ids).clamp_(min=0)]
            torch.where(token_ids < 0, chosen.to(token_ids.dtype), token_ids, out=token_ids)

    @contextmanager
    def _step(self, inputs: StepInputs) -> Iterator[None]:
        """All layers read these inputs, and what lies below the head is computed once."""
        self._attention.batch = inputs.attention
        self._lora.segments = _if_lora(inputs.segments)
        self._lora.has_extras = inputs.has_extras
        try:
            with self.body.once():
                yield
        finally:
            self._attention.batch = None
            self._lora.segments = self._lora.logits_segments = None

    def _logits(self, inputs: StepInputs, logits_pass: LogitsPass) -> torch.Tensor:
        """(rows, vocab) logits of a pass's own rows, within a step."""
        self._lora.logits_segments = _if_lora(logits_pass.segments)
        output = self.base.model(
            input_ids=inputs.token_ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            logits_to_keep=logits_pass.rows,
        )
        logits: torch.Tensor = output.logits[0]
        num_rows = logits_pass.rows.shape[0]
        if logits.shape[0] != num_rows:
            raise UnsupportedModel(
                f"{type(self.base.model).__name__} does not give the logits of the chosen rows: of {num_rows} rows "
                f"there are {logits.shape[0]}"
            )
        if inputs.has_extras:
            logits = self._lora.with_own_vocabularies(logits, self.base.vocab_size)
        return logits[logits_pass.own]

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """(rows, vocab) logits of a step of one pass."""
        (only,) = inputs.passes
        with self._step(inputs):
            return self._logits(inputs, only)

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
        norm_layers.substitute_norms(model, geometry.vectors, self._lora, self.pool.vector)
        paged_attention.install(model, self._attention)
        why_not_fused = fused_layers.substitute(model, self._attention)
        self.is_fused = why_not_fused is None
        self.pool.untabled = frozenset(geometry.vectors) - fused_layers.tabled_norms(model)
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
                num_rows = min(max_chunks, self.graph_forms[-1].num_rows)
                blank = blank_batch(
                    GraphForm(num_rows, num_rows, self.max_pages, has_extras=self._kinds[-1]),
                    null_page=self.null_pages[0],
                    has_lora=self._kinds[-1],
                    max_chunks=max_chunks,
                    max_logits=self.pass_rows[1],
                    chunk_length=chunk_length,
                )
                self._compute_blank(blank, max_batch_tokens)
            prompt = blank_prompt(
                2,
                page_tokens=self.cache.page_tokens,
                null_page=self.null_pages[0],
                has_lora=self._kinds[-1],
                chunk_length=16,
            )
            self._compute_blank(prompt, max_batch_tokens)
            self.pool.warm_up()
        self.stages_s["compile"] = time.monotonic() - started_s
        logger.info("compiled kernels, %.1f s", self.stages_s["compile"])
        started_s = time.monotonic()
        beyond_graphs = self.graph_forms[-1].num_rows + 1
        sizes = [n for n in (1024, 2048, beyond_graphs, 4096) if n < max_batch_tokens] + [max_batch_tokens]
        variants: list[tuple[int, int, bool, int | None]] = [
            (n, 128, has_lora, None) for n in sizes for has_lora in self._kinds
        ]
        variants += [(sizes[0], chunk_length, self._kinds[-1], None) for chunk_length in (16, 32, 64)]
        # A prompt with the logprobs of all its tokens: the most logits that there can be at once.
        variants += [(max_batch_tokens, 128, self._kinds[-1], self.pass_rows[1])]
        for num_rows, chunk_length, has_lora, max_pass_rows in variants:
            batch = blank_prompt(
                num_rows,
                page_tokens=self.cache.page_tokens,
                null_page=self.null_pages[0],
                has_lora=has_lora,
                chunk_length=chunk_length,
                max_pass_rows=max_pass_rows,
            )
            self._compute_blank(batch, max_batch_tokens)
        self.pool.warm_up()
        self.stages_s["warm up"] = time.monotonic() - started_s
        logger.info("warmed up with prompts of %s tokens, %.1f s", sizes, self.stages_s["warm up"])

    def _compute_blank(self, blank: StepMessage, max_batch_tokens: int) -> None:
        """Compute a step of nothing, with all its logits. Raises WorkerConfigError when it does not fit."""
        inputs = blank.view(torch.from_numpy(blank.packed).to(self.base.device))
        try:
            with self._step(inputs):
                for each in inputs.passes:
                    logits = self._logits(inputs, each)
                    with_logprobs(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64), probe.TOP)
                    del logits
            torch.cuda.synchronize(self.base.device)
        except torch.OutOfMemoryError as error:
            raise WorkerConfigError(
                f"no memory is left for a step of {blank.header.num_rows} tokens: lower worker.max_batch_tokens "
                f"({max_batch_tokens}), worker.logits_chunk_tokens ({self.pass_rows[1]}), "
                "worker.kv_bytes, adapters.pool_bytes or worker.gpu_memory_utilization"
            ) from error

    @torch.inference_mode()
    def _capture_graphs(self) -> None:
        """Capture steps of every form, largest first, so that the smaller ones reuse its memory."""
        started_s = time.monotonic()
        pool, logits = torch.cuda.graph_pool_handle(), None
        with_extras = {replace(form, has_extras=False): form for form in self.extra_forms}
        for form in reversed(self.graph_forms):
            bounds = chunk_bounds(form.num_rows, self.pool.num_slots, form.chunk_length)
            variants = [(form, True, n) for n in reversed(bounds)] if self.pool.num_slots else []
            variants += [(with_extras[form], True, bounds[-1])] if form in with_extras else []
            for variant, has_lora, max_chunks in (*variants, (form, False, bounds[0])):
                blank = blank_batch(
                    variant,
                    null_page=self.null_pages[0],
                    has_lora=has_lora,
                    max_chunks=max_chunks,
                    max_logits=self.pass_rows[1],
                )
                try:
                    graph = capture(self._forward, blank, self.base.device, pool, logits)
                except torch.OutOfMemoryError as error:
                    raise WorkerConfigError(
                        f"no memory is left for a CUDA graph of {form.num_rows} rows: lower "
                        "worker.gpu_memory_utilization, worker.kv_bytes, adapters.pool_bytes or "
                        f"worker.logits_chunk_tokens ({self.pass_rows[1]})"
                    ) from error
                logits = graph.logits if logits is None else logits
                self._graphs[blank.header.graph_key] = graph
            logger.info("captured a step of %d rows, %.1f s", form.num_rows, time.monotonic() - started_s)
        self.stages_s["capture"] = time.monotonic() - started_s


def _if_lora(segments: Segments) -> Segments | None:
    return segments if segments.has_lora else None
