"""Fused decoder layers against PEFT: chunks and decodes of a mixed batch, and what they leave alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafleet.workers.memory.kv_cache import KVCache, LayerKV
from lorafleet.workers.model import fused_layers, paged_attention
from lorafleet.workers.model.attention_calls import read_calls
from lorafleet.workers.model.geometry import geometry_of, projection_groups
from lorafleet.workers.model.lora_context import LoraContext
from lorafleet.workers.model.lora_layers import substitute_projections
from lorafleet.workers.model.paged_attention import AttentionContext
from lorafleet.workers.step.batch import AttentionBatch
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind, make_base
from tests.support.oracle import generate_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker

NUM_TOKENS = 24


@pytest.mark.parametrize(
    "kind",
    ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama_tied", "mistral", "qwen2", "qwen3"))],
)
async def test_a_mixed_batch_says_what_peft_says(
    kind: BaseKind, base_of: Callable[[BaseKind], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(kind)
    shelf = Shelf(base)
    folders = [None, make_adapter(tmp_path / "a", base, "rank16"), make_adapter(tmp_path / "b", base, "rank4_qv")]
    versions = [None if folder is None else shelf.put(folder) for folder in folders]
    prompts = [range(5, 5 + length) for length in (3, 70, 41)]
    with caplog.at_level(logging.INFO):
        # 16 tokens a step: prompts go in chunks, beside decodes.
        async with open_worker(shelf, max_batch_tokens=16) as worker:
            answers = await asyncio.gather(
                *(
                    ask(worker, prompt, version, greedy(NUM_TOKENS, logprobs=0))
                    for prompt in prompts
                    for version in versions
                )
            )
    assert "fused of 2 layers: 2 layers, 2 attentions, 2 MLPs" in caplog.text
    cases = [(prompt, folder) for prompt in prompts for folder in folders]
    for (prompt, folder), answer in zip(cases, answers, strict=True):
        expected = generate_with_peft(base, folder, prompt, NUM_TOKENS)
        assert answer.tokens == expected.tokens
        logprobs = torch.tensor([entry.logprob for entry in answer.logprobs])
        assert (logprobs - expected.chosen_logprobs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "overrides", "parts"),
    [
        ("gpt2", {}, "2 layers, 2 attentions, 0 MLPs"),
        ("llama", {"hidden_act": "relu2"}, "2 layers, 2 attentions, 0 MLPs"),
    ],
    ids=["gpt2", "llama_relu2"],
)
@pytest.mark.slow
async def test_what_no_kernel_computes_runs_in_transformers_own_modules(
    kind: BaseKind, overrides: dict[str, Any], parts: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base", kind, **overrides)
    with caplog.at_level(logging.INFO):
        async with open_worker(Shelf(base)) as worker:
            answer = await ask(worker, range(5, 20), None, greedy(8))
    assert f"fused of 2 layers: {parts}" in caplog.text
    assert answer.tokens == generate_with_peft(base, None, range(5, 20), 8).tokens


class _Steps:
    """A base on the GPU with fused layers and no adapters, fed by hand."""

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to("cuda").eval()
        calls = read_calls(model, 256)
        layers = [LayerKV(call.num_kv_heads, call.head_dim) for call in calls.values()]
        cache = KVCache(layers, num_pages=32, page_tokens=16, dtype=dtype, device=torch.device("cuda"))
        self.context = AttentionContext(cache, calls)
        for group in projection_groups(geometry_of(model, "bfloat16").modules):
            if "embed" not in group[0]:
                substitute_projections(model, group, None, LoraContext())  # type: ignore[arg-type]
        paged_attention.install(model, self.context, 256)
        assert fused_layers.substitute(model, self.context, 256).kind == "fused"
        self.model = model
        # Each of two sequences has half of the pages.
        self.tables = torch.arange(32, dtype=torch.int32, device="cuda").view(2, 16)

    def batch(self, rows: list[int], lengths: list[int]) -> tuple[Tensor, AttentionBatch]:
        """(positions, batch) of the sequences' last rows."""
        spans = [torch.arange(length - n, length) for n, length in zip(rows, lengths, strict=True)]
        positions = torch.cat(spans).to("cuda", torch.int32)
        owners = torch.repeat_interleave(torch.arange(2), torch.tensor(rows)).to("cuda")
        return positions, AttentionBatch(
            row_pages=self.tables[owners, positions // 16],
            row_offsets=positions % 16,
            query_indptr=torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32).to("cuda"),
            query_lengths=rows,
            context_lengths=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            host_context_lengths=lengths,
            block_tables=self.tables,
            num_decodes=sum(n == 1 for n in rows),
        )

    def run(self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        """(rows, vocab) logits."""
        self.context.batch = batch
        logits: Tensor = self.model(input_ids=token_ids[None], position_ids=positions[None], use_cache=False).logits[0]
        return logits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_on_a_gpu_chunks_decodes_and_captured_decodes_are_transformers(
    kind: BaseKind, dtype: torch.dtype, base_of: Callable[[BaseKind], Path]
) -> None:
    base = base_of(kind)
    tokens = torch.randint(5, 300, (2, 90), generator=torch.Generator().manual_seed(0)).cuda()
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).cuda()(tokens).logits.log_softmax(-1)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).cuda()(tokens).logits.double().log_softmax(-1)
    steps = _Steps(base, dtype)
    ours = torch.full_like(exact, float("nan"))
    done = [0, 0]
    for rows in ([40, 7], [1, 30], [9, 1]):
        lengths = [start + n for start, n in zip(done, rows, strict=True)]
        order = sorted(range(2), key=lambda index: rows[index] > 1)
        steps.tables = torch.arange(32, dtype=torch.int32, device="cuda").view(2, 16)[order]
        positions, batch = steps.batch([rows[i] for i in order], [lengths[i] for i in order])
        owners = torch.repeat_interleave(torch.tensor(order), torch.tensor([rows[i] for i in order]))
        ours[owners, positions.long()] = steps.run(tokens[owners, positions.long()], positions, batch).double()
        done = lengths
    steps.tables = torch.arange(32, dtype=torch.int32, device="cuda").view(2, 16)
    positions, batch = steps.batch([1, 1], [length + 1 for length in done])
    token_ids = tokens[torch.arange(2), positions.long()]
    steps.run(token_ids, positions, batch)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = steps.run(token_ids, positions, batch)
    for _ in range(40):
        now, now_batch = steps.batch([1, 1], [length + 1 for length in done])
        token_ids.copy_(tokens[torch.arange(2), now.long()])
        for static, fresh in (
            (positions, now),
            (batch.row_pages, now_batch.row_pages),
            (batch.row_offsets, now_batch.row_offsets),
            (batch.context_lengths, now_batch.context_lengths),
        ):
            static.copy_(fresh)
        graph.replay()
        ours[torch.arange(2), now.long()] = logits.double()
        done = [length + 1 for length in done]
    for sequence, length in enumerate(done):
        error = (ours[sequence, :length].log_softmax(-1) - exact[sequence, :length]).norm()
        their_error = (theirs[sequence, :length] - exact[sequence, :length]).norm()
        assert error <= 1.5 * their_error + 1e-3, (float(error), float(their_error))
