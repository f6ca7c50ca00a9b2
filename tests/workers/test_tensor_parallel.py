"""Workers of several ranks, over gloo, against PEFT and transformers and against a worker of one rank."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.workers.config import PoolConfig
from lorafleet.workers.request import SamplingParams
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind, make_base
from tests.support.oracle import prompt_logprobs_with_peft
from tests.workers import test_dora, test_extras, test_vocabularies
from tests.workers.harness import Answer, Shelf, ask, assert_pefts, greedy, open_worker, random_prompt
from tests.workers.test_extras import cases_of
from tests.workers.test_refusals import DEEPSEEK, SHAPE, save_base
from tests.workers.test_vocabularies import bench_of

__all__ = ["bench_of", "cases_of"]

NUM_NEW = 12
ON_RANKS = pytest.mark.parametrize("size", [2, 4])
IN_PARTS: dict[str, Any] = {"max_batch_tokens": 16, "logits_chunk_tokens": 4}
"""Prompts come in parts, and logits in several passes over the head."""
Asked = list[tuple[str | None, tuple[int, ...], Answer]]


def check(shelf: Shelf, asked: Asked, tolerance: float = 1e-4) -> None:
    """Each token is among the likeliest, and every logprob, the prompt's too, is what PEFT gives."""
    for version, prompt, answer in asked:
        assert_pefts(shelf, version, prompt, answer, tolerance)
        assert len(answer.tokens) == NUM_NEW


async def ask_all(shelf: Shelf, sampling: SamplingParams | None = None, **settings: Any) -> Asked:
    """The base and each adapter in one mixed batch, twice."""
    versions = [None, *shelf.versions]
    prompts = [random_prompt(3 + 4 * number, number) for number in range(len(versions))]
    asked = [(version, prompt) for version, own in zip(versions, prompts, strict=True) for prompt in (own, prompts[-1])]
    sampling = sampling or greedy(NUM_NEW, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, **settings) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for version, prompt in asked))
    return [(version, prompt, answer) for (version, prompt), answer in zip(asked, answers, strict=True)]


def tokens_of(asked: Asked) -> list[tuple[int, ...]]:
    return [answer.tokens for *_, answer in asked]


def make_shelf(base: Path, folder: Path) -> Shelf:
    shelf = Shelf(base)
    for recipe in ("rank16", "embeddings_all", "rank4_qv"):
        shelf.put(make_adapter(folder / recipe, base, recipe))
    return shelf


@pytest.fixture(scope="module")
def shelf_of(
    base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[BaseKind], Shelf]:
    made: dict[BaseKind, Shelf] = {}

    def of(kind: BaseKind) -> Shelf:
        if kind not in made:
            made[kind] = make_shelf(base_of(kind), tmp_path_factory.mktemp(f"ranks-{kind}"))
        return made[kind]

    return of


@pytest.mark.slow
async def test_two_ranks(shelf_of: Callable[[BaseKind], Shelf], tmp_path: Path) -> None:
    """Tied, with biases, and with DoRA, whose norms are sums over ranks."""
    shelf = Shelf(shelf_of("qwen2").base)
    shelf.put(make_adapter(tmp_path / "embeddings_all", shelf.base, "embeddings_all"))
    shelf.put(make_adapter(tmp_path / "dora", shelf.base, "embeddings_all", use_dora=True, bias="all"))
    on_two = await ask_all(shelf, tensor_parallel_size=2)
    check(shelf, on_two)
    assert tokens_of(on_two) == tokens_of(await ask_all(shelf))


@pytest.mark.slow
@ON_RANKS
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mistral", "qwen3"])
async def test_kinds_of_bases(shelf_of: Callable[[BaseKind], Shelf], kind: BaseKind, size: int) -> None:
    """With four ranks, each head of keys and values is on two of them."""
    shelf = shelf_of(kind)
    asked = await ask_all(shelf, tensor_parallel_size=size, **(IN_PARTS if kind == "mistral" else {}))
    check(shelf, asked)
    assert tokens_of(asked) == tokens_of(await ask_all(shelf))


@pytest.mark.slow
async def test_transformers_own_layers(tmp_path: Path) -> None:
    """A kind whose layers are not fused."""
    shelf = make_shelf(make_base(tmp_path / "base", "qwen3", hidden_act="gelu"), tmp_path)
    check(shelf, await ask_all(shelf, tensor_parallel_size=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "targets"),
    [
        ("deepseek_v2", {**DEEPSEEK, "v_head_dim": 16}, ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
        (
            "olmoe",
            {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
            ("q_proj", "k_proj", "o_proj"),
        ),
    ],
)
async def test_mixtures_with_attention_of_their_own(
    kind: str, settings: dict[str, Any], targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Latent attention, cut by heads behind the latent, and attention that every rank holds whole."""
    shelf = Shelf(save_base(tmp_path / "base", kind, settings))
    shelf.put(make_adapter(tmp_path / "attention", shelf.base, r=4, lora_alpha=8, target_modules=targets))
    shelf.put(make_adapter(tmp_path / "all", shelf.base, r=4, lora_alpha=8, target_modules="all-linear"))
    on_two = await ask_all(shelf, tensor_parallel_size=2)
    check(shelf, on_two)
    assert tokens_of(on_two) == tokens_of(await ask_all(shelf))


@pytest.mark.slow
@ON_RANKS
@pytest.mark.parametrize("settings", [{}, IN_PARTS], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("kind", ["llama_tied", "qwen2"])
async def test_parameters_of_their_own(
    cases_of: Callable[[BaseKind], test_extras.Cases], kind: BaseKind, settings: dict[str, Any], size: int
) -> None:
    await test_extras.ask_all(cases_of(kind), **settings, tensor_parallel_size=size)


@pytest.mark.slow
@ON_RANKS
async def test_vocabularies_of_their_own(bench_of: Callable[[BaseKind], test_vocabularies.Bench], size: int) -> None:
    await test_vocabularies.ask_all(bench_of("llama"), tensor_parallel_size=size)
    await test_vocabularies.ask_all(bench_of("llama_tied"), **IN_PARTS, tensor_parallel_size=size)


@pytest.mark.slow
@ON_RANKS
@pytest.mark.parametrize("settings", [IN_PARTS, {"kv_bytes": 150_000}], ids=["in-parts", "preempted"])
async def test_dora_fields(
    base_of: Callable[[BaseKind], Path], tmp_path: Path, settings: dict[str, Any], size: int
) -> None:
    shelf = test_dora.shelf_of(base_of("qwen2"), tmp_path)
    async with open_worker(shelf, **settings, tensor_parallel_size=size) as worker:
        answers = await test_dora.ask_all(shelf, worker)
    for version, prompt, answer in answers:
        test_dora.check(shelf, version, prompt, answer)


@pytest.mark.slow
async def test_penalties_and_draws_as_on_one_rank(shelf_of: Callable[[BaseKind], Shelf]) -> None:
    shelf = shelf_of("llama")
    sampling = SamplingParams(
        max_tokens=24, temperature=0.8, top_p=0.9, seed=7, presence_penalty=0.7, repetition_penalty=1.2, ignore_eos=True
    )
    on_two = await ask_all(shelf, sampling, tensor_parallel_size=2)
    assert tokens_of(on_two) == tokens_of(await ask_all(shelf, sampling))


@pytest.mark.slow
async def test_cached_prefixes_and_a_pool_of_one_adapter(shelf_of: Callable[[BaseKind], Shelf]) -> None:
    """Adapters come and go, and their pages are others'."""
    shelf = shelf_of("llama")
    async with open_worker(shelf, tensor_parallel_size=2) as worker:
        pool = worker._parts.pool
        largest = max(pool.num_pages(weights.manifest) for weights in shelf.weights.values())
        small = PoolConfig(max_rank=64, pool_bytes=largest * pool.layout.page_bytes)
    prompt, sampling = random_prompt(40, 3), greedy(NUM_NEW, logprobs=0)
    versions = [version for _ in range(2) for version in shelf.versions for _ in range(2)]
    async with open_worker(shelf, pool=small, tensor_parallel_size=2) as worker:
        answers = [await ask(worker, prompt, version, sampling) for version in versions]
        assert (await worker.residency()).reloads_after_eviction > 0
    assert any(answer.last.num_cached_tokens == 32 for answer in answers)
    for version, answer in zip(versions, answers, strict=True):
        assert version is not None
        expected = prompt_logprobs_with_peft(shelf.base, shelf.folders[version], (*prompt, *answer.tokens))
        chosen = expected[len(prompt) - 1 : -1].gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert (torch.tensor([entry.logprob for entry in answer.logprobs]) - chosen).abs().max() < 1e-4
