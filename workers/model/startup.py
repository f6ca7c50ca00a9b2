"""Makes a runner ready to serve: substitutes the base's layers, probes the result, warms up and captures graphs."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import replace

import torch

from lorafleet.kernels import fp8
from lorafleet.kernels.launching import compiled_ahead
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.state_store import StateStore
from lorafleet.workers.model import (
    expert_layers,
    fused_layers,
    latent_attention,
    lora_layers,
    norm_layers,
    paged_attention,
    probe,
    recurrent_layers,
)
from lorafleet.workers.model.cuda_graphs import capture, kernel_shapes
from lorafleet.workers.model.experts import projections
from lorafleet.workers.model.geometry import projection_groups
from lorafleet.workers.model.loader import BaseModel
from lorafleet.workers.model.logits import BodyOnce
from lorafleet.workers.model.lora_context import LoraContext
from lorafleet.workers.model.paged_attention import AttentionContext
from lorafleet.workers.model.recurrent_layers import RecurrentContext
from lorafleet.workers.model.row_norms import RowNorms
from lorafleet.workers.model.runner import ModelRunner, Substituted
from lorafleet.workers.model.sampler import with_logprobs
from lorafleet.workers.ranks import Ranks
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.step.layout import blank_batch, blank_prompt, chunk_bounds
from lorafleet.workers.step.message import StepMessage

logger = logging.getLogger(__name__)


def start_runner(
    base: BaseModel,
    cache: KVCache,
    pool: AdapterPool,
    states: StateStore,
    *,
    max_pages: int,
    graph_forms: tuple[GraphForm, ...] = (),
    max_batch_tokens: int = 2048,
    max_pass_rows: int = 512,
    is_probed: bool = True,
    ranks: Ranks | None = None,
) -> ModelRunner:
    """Make a runner that no request has to wait for. Its base's model is changed in place.

    max_batch_tokens: most rows of a step. ranks: this one and those that compute with it. The other arguments are as in
    `ModelRunner`. With `is_probed`, raises UnsupportedModel unless the base answers as transformers does. Raises
    WorkerConfigError if memory is short.
    """
    runner = ModelRunner(
        base,
        cache,
        pool,
        states,
        substitute(base, cache, pool, states, ranks),
        max_pages=max_pages,
        graph_forms=graph_forms,
        max_pass_rows=max_pass_rows,
        ranks=ranks,
    )
    if is_probed:
        probe.check(runner)
    if runner.graph_forms:
        _warm_up(runner, max_batch_tokens)
        _capture_graphs(runner)
    return runner


def substitute(
    base: BaseModel, cache: KVCache, pool: AdapterPool, states: StateStore, ranks: Ranks | None = None
) -> Substituted:
    """Replace the base's leaves by layers that know about adapters, pages and states. Raises UnsupportedModel."""
    lora, attention = (
        LoraContext(pool.extras, resident_vocabularies=pool.vocabularies),
        AttentionContext(cache, base.calls),
    )
    model, geometry = base.model, base.geometry
    counts: Counter[str] = Counter()
    linear = [name for name, shape in geometry.modules.items() if shape.kind == "linear"]
    for group in projection_groups(linear):
        share = base.shares.get(group[0])
        is_sum = share is not None and share.shape.in_dim < geometry.modules[group[0]].in_dim
        others = None if share is None else ranks
        lora_layers.substitute_projections(model, group, pool.weights(group), lora, others, is_sum=is_sum)
        counts["+".join(name.rpartition(".")[2] for name in group)] += 1
    for name, shape in geometry.modules.items():
        if shape.kind == "router":
            expert_layers.substitute_router(model, name, pool.weights((name,)), lora)
            counts[name.rpartition(".")[2]] += 1
        if shape.kind == "embedding":
            part, others = base.shares.get(name), ranks if name in base.shares else None
            first_token = 0 if part is None else part.first_input
            lora_layers.substitute_embedding(model, name, pool.embedding_weights(name), lora, others, first_token)
            counts[name.rpartition(".")[2]] += 1
    for name in dict.fromkeys(
        name.rpartition(".")[0] for name, shape in geometry.modules.items() if shape.kind == "experts"
    ):
        parameters = {leaf: f"{name}.{leaf}" for leaf in projections(model.get_submodule(name))}
        weights = {leaf: pool.expert_weights(parameter) for leaf, parameter in parameters.items()}
        part = base.shares.get(next(iter(parameters.values())))
        first_expert, others = (0, None) if part is None else (part.first_expert, ranks)
        expert_layers.substitute_experts(model, name, weights, pool.expert_stride, lora, others, first_expert)
        counts[name.rpartition(".")[2]] += 1
    norm_layers.substitute_norms(model, geometry.vectors, lora, pool.vector)
    paged_attention.install(model, attention, base.max_model_len)
    pool.absorbed = latent_attention.install(model, attention)
    recurrent = RecurrentContext(states)
    recurrent_layers.install(model, recurrent)
    parts = fused_layers.substitute(model, attention, base.max_model_len)
    pool.untabled = frozenset(geometry.vectors) - parts.tabled_norms()
    logger.info(
        "%s: substituted %s; attention reads pages of %d tokens; %s",
        type(model).__name__,
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        cache.page_tokens,
        parts,
    )
    pool.row_norms = RowNorms(model)
    return Substituted(lora, attention, recurrent, BodyOnce(model), parts.kind)


@torch.inference_mode()
def _warm_up(runner: ModelRunner, max_batch_tokens: int) -> None:
    """Have kernels compiled, and run prompts of the lengths that no graph serves: no request waits for either.

    Raises WorkerConfigError when the largest does not fit the memory that is left.
    """
    started_s, kinds = time.monotonic(), _kinds(runner)
    with compiled_ahead(len(os.sched_getaffinity(0))):
        for chunk_length, max_chunks in kernel_shapes(max_batch_tokens, runner.pool.num_slots):
            row_counts = [min(max_chunks, runner.graph_forms[-1].num_rows)]
            if runner.base.multiplies_fp8 and min(max_batch_tokens, max_chunks * chunk_length) > fp8.FEW_ROWS:
                row_counts.append(fp8.FEW_ROWS + 1)  # the kernels behind such a product are others
            for num_rows in row_counts:
                blank = blank_batch(
                    GraphForm(num_rows, num_rows, runner.max_pages, has_extras=kinds[-1]),
                    null_page=runner.null_pages[0],
                    has_lora=kinds[-1],
                    max_chunks=max_chunks,
                    max_logits=runner.pass_rows[1],
                    chunk_length=chunk_length,
                )
                _compute_blank(runner, blank, max_batch_tokens)
        prompt = blank_prompt(
            2,
            page_tokens=runner.cache.page_tokens,
            null_page=runner.null_pages[0],
            has_lora=kinds[-1],
            chunk_length=16,
        )
        _compute_blank(runner, prompt, max_batch_tokens)
        runner.pool.warm_up()
    runner.startup_s["compile"] = time.monotonic() - started_s
    logger.info("compiled kernels, %.1f s", runner.startup_s["compile"])
    started_s = time.monotonic()
    beyond_graphs = runner.graph_forms[-1].num_rows + 1
    sizes = [n for n in (1024, 2048, beyond_graphs, 4096) if n < max_batch_tokens] + [max_batch_tokens]
    variants: list[tuple[int, int, bool, int | None]] = [(n, 128, has_lora, None) for n in sizes for has_lora in kinds]
    variants += [(sizes[0], chunk_length, kinds[-1], None) for chunk_length in (16, 32, 64)]
    # A prompt with the logprobs of all its tokens: the most logits that there can be at once.
    variants += [(max_batch_tokens, 128, kinds[-1], runner.pass_rows[1])]
    for num_rows, chunk_length, has_lora, max_pass_rows in variants:
        batch = blank_prompt(
            num_rows,
            page_tokens=runner.cache.page_tokens,
            null_page=runner.null_pages[0],
            has_lora=has_lora,
            chunk_length=chunk_length,
            max_pass_rows=max_pass_rows,
        )
        _compute_blank(runner, batch, max_batch_tokens)
    runner.compile_prompts(max_batch_tokens)
    runner.pool.warm_up()
    runner.startup_s["warm up"] = time.monotonic() - started_s
    logger.info("warmed up with prompts of %s tokens, %.1f s", sizes, runner.startup_s["warm up"])


def _compute_blank(runner: ModelRunner, blank: StepMessage, max_batch_tokens: int) -> None:
    """Compute a step of nothing, with all its logits. Raises WorkerConfigError when it does not fit."""
    inputs = blank.view(torch.from_numpy(blank.packed).to(runner.base.device))
    try:
        with runner.step(inputs):
            for each in inputs.passes:
                logits = runner.logits_of(inputs, each)
                with_logprobs(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64), probe.TOP)
                del logits
        torch.cuda.synchronize(runner.base.device)
    except torch.OutOfMemoryError as error:
        raise WorkerConfigError(
            f"no memory is left for a step of {blank.header.num_rows} tokens: lower worker.max_batch_tokens "
            f"({max_batch_tokens}), worker.logits_chunk_tokens ({runner.pass_rows[1]}), "
            "worker.kv_bytes, adapters.pool_bytes or worker.gpu_memory_utilization"
        ) from error


@torch.inference_mode()
def _capture_graphs(runner: ModelRunner) -> None:
    """Capture steps of every form, largest first, so that the smaller ones reuse its memory."""
    started_s = time.monotonic()
    pool, logits = torch.cuda.graph_pool_handle(), None
    with_extras = {replace(form, has_extras=False): form for form in runner.extra_forms}
    for form in reversed(runner.graph_forms):
        bounds = chunk_bounds(form.num_rows, runner.pool.num_slots, form.chunk_length)
        plain = replace(form, skips_experts=runner.has_experts)
        variants = [(plain, True, n) for n in reversed(bounds)] if runner.pool.num_slots else []
        variants += [(form, True, bounds[-1])] if runner.has_experts else []
        variants += [(with_extras[form], True, bounds[-1])] if form in with_extras else []
        for variant, has_lora, max_chunks in (*variants, (form, False, bounds[0])):
            blank = blank_batch(
                variant,
                null_page=runner.null_pages[0],
                has_lora=has_lora,
                max_chunks=max_chunks,
                max_logits=runner.pass_rows[1],
            )
            try:
                graph = capture(
                    runner.forward, blank, runner.base.device, pool, logits, has_collectives=runner.ranks.size > 1
                )
            except torch.OutOfMemoryError as error:
                raise WorkerConfigError(
                    f"no memory is left for a CUDA graph of {form.num_rows} rows: lower "
                    "worker.gpu_memory_utilization, worker.kv_bytes, adapters.pool_bytes or "
                    f"worker.logits_chunk_tokens ({runner.pass_rows[1]})"
                ) from error
            logits = graph.logits if logits is None else logits
            runner.graphs[blank.header.graph_key] = graph
        logger.info("captured a step of %d rows, %.1f s", form.num_rows, time.monotonic() - started_s)
    runner.startup_s["capture"] = time.monotonic() - started_s


def _kinds(runner: ModelRunner) -> tuple[bool, ...]:
    """Return, in rising order, if a step may have LoRA work."""
    return (False, True) if runner.pool.num_slots else (False,)
