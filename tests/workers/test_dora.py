"""DoRA beside base requests and plain LoRA: PEFT's tokens and logprobs, whatever happens to a request meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafleet.kernels.fp8 import dequantise, quantise_weight
from lorafleet.workers.config import ModelConfig, PoolConfig
from lorafleet.workers.model import row_norms
from lorafleet.workers.model.lora_layers import ProjectionSlice
from lorafleet.workers.model.row_norms import RowNorms
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.worker import Worker
from tests.support.adapters import ALL_SEVEN, make_adapter
from tests.support.bases import BaseKind
from tests.support.oracle import prompt_logprobs_with_peft
from tests.workers.harness import Answer, Shelf, ask, assert_pefts, greedy, open_worker, random_prompt
from tests.workers.test_replayed_steps import BY_PROMPT, BY_ROW, replay

NUM_NEW = 12
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("rank4_qv", {}),
    "all": ("embeddings_all", {"use_dora": True}),
    "rslora": ("rslora", {"use_dora": True}),
    "patterns": ("rank_pattern", {"use_dora": True}),
    "one": ("rank4_qv", {"use_dora": True, "target_modules": ("k_proj", "up_proj")}),
    "biases": ("rank4_qv", {"use_dora": True, "bias": "all", "target_modules": ALL_SEVEN}),
}


def shelf_of(base: Path, folder: Path) -> Shelf:
    shelf = Shelf(base)
    for name, (kind, options) in RECIPES.items():
        shelf.put(make_adapter(folder / name, base, kind, **options))
    return shelf


@pytest.fixture(scope="module")
def shelf(base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelf_of(base_of("qwen2"), tmp_path_factory.mktemp("dora"))


def check(shelf: Shelf, version: str | None, prompt: tuple[int, ...], answer: Answer, tolerance: float = 1e-4) -> None:
    """Each token is among the likeliest, and has the logprob that PEFT gives it."""
    assert_pefts(shelf, version, prompt, answer, tolerance)
    assert len(answer.tokens) == NUM_NEW


async def ask_all(shelf: Shelf, worker: Worker) -> list[tuple[str | None, tuple[int, ...], Answer]]:
    """Two requests for the base and for each adapter at once."""
    versions = [version for version in (None, *shelf.versions) for _ in range(2)]
    prompts = [random_prompt(20 + 3 * number, number) for number in range(len(versions))]
    sampling = greedy(NUM_NEW, logprobs=0, prompt_logprobs=True)
    pairs = list(zip(prompts, versions, strict=True))
    answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for prompt, version in pairs))
    return [(version, prompt, answer) for (prompt, version), answer in zip(pairs, answers, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens": 16, "logits_chunk_tokens": 4}, {"kv_bytes": 300_000}],
    ids=["at-once", "in-chunks", "preempted"],
)
async def test_a_mixed_batch(shelf: Shelf, settings: dict[str, Any]) -> None:
    async with open_worker(shelf, **settings) as worker:
        answers = await ask_all(shelf, worker)
    for version, prompt, answer in answers:
        check(shelf, version, prompt, answer)


@pytest.mark.slow
async def test_from_a_cached_prefix_and_after_eviction(shelf: Shelf) -> None:
    async with open_worker(shelf) as worker:
        pool = worker._parts.pool
        largest = max(pool.num_pages(weights.manifest) for weights in shelf.weights.values())
        small = PoolConfig(max_rank=64, pool_bytes=largest * pool.layout.page_bytes)
    prompt, sampling = random_prompt(40, 3), greedy(NUM_NEW, logprobs=0)
    asked = [version for _ in range(2) for version in shelf.versions]
    async with open_worker(shelf, pool=small) as worker:
        answers = [await ask(worker, prompt, version, sampling) for version in asked for _ in range(2)]
        assert (await worker.residency()).reloads_after_eviction >= len(shelf.versions) - 1
        assert any(answer.last.num_cached_tokens == 32 for answer in answers)
        await worker.reconcile({})
        pool = worker._parts.pool
        assert pool.num_pages_used == 0
        assert (pool._vectors == -1).all()
    for version, answer in zip([version for version in asked for _ in range(2)], answers, strict=True):
        expected = prompt_logprobs_with_peft(shelf.base, shelf.folders[version], (*prompt, *answer.tokens))
        chosen = expected[len(prompt) - 1 : -1].gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert (torch.tensor([entry.logprob for entry in answer.logprobs]) - chosen).abs().max() < 1e-4


@pytest.mark.parametrize("is_fp8", [False, True], ids=["plain", "fp8"])
def test_norms_of_rows(is_fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that are in fp8 it is the weights' norms, not those of what they are kept as."""
    monkeypatch.setattr(row_norms, "MAX_ELEMENTS", 100)
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(width, 48, generator=generator) for width in (32, 16)]
    fused = nn.Module()
    fused.widths = [32, 16]  # type: ignore[assignment]
    whole = quantise_weight(*(matrix.bfloat16() for matrix in matrices)) if is_fp8 else None
    fused.weight = nn.Parameter(torch.cat(matrices) if whole is None else whole.values, requires_grad=False)
    fused.fp8_weight = whole  # type: ignore[assignment]
    expected = torch.cat(matrices) if whole is None else dequantise(whole, torch.float32)
    model = nn.ModuleList([ProjectionSlice(index, fused, []) for index in range(2)])  # type: ignore[arg-type]
    for index, own in enumerate(torch.split(expected, [32, 16])):
        a, b = torch.randn(3, 48, generator=generator), torch.randn(3, len(own), generator=generator)
        found = RowNorms(model)(str(index), a, b, 0.7)
        wanted = (own.double() + 0.7 * b.double().T @ a.double()).norm(dim=1)
        torch.testing.assert_close(found.double().sqrt(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forms", [BY_ROW, BY_PROMPT], ids=["by row", "by prompt"])
@pytest.mark.slow
async def test_in_graphs(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, forms: tuple[GraphForm, ...]) -> None:
    replayed = replay(monkeypatch, forms)
    async with open_worker(shelf, max_running=40) as worker:
        answers = await ask_all(shelf, worker)
    for version, prompt, answer in answers:
        check(shelf, version, prompt, answer)
    assert any(header.form is not None and header.form.has_extras for header in replayed)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
async def test_on_a_gpu(kind: BaseKind, base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    base = base_of(kind)
    if kind == "gpt2":
        shelf = Shelf(base)
        shelf.put(make_adapter(tmp_path / "plain", base, "rank4"))
        shelf.put(make_adapter(tmp_path / "dora", base, "rank16", use_dora=True))
    else:
        shelf = shelf_of(base, tmp_path)
    model = ModelConfig(id="base", source=str(base), dtype="float32")
    async with open_worker(shelf, model=model, device="cuda") as worker:
        answers = await ask_all(shelf, worker)
    for version, prompt, answer in answers:
        check(shelf, version, prompt, answer, 0.1)
