"""Keys and values in fp8: against PEFT on a model whose attention rounds them, and how far they move answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorafleet.workers.config import ModelConfig
from tests.support.bases import BaseKind
from tests.workers.harness import Answer, Shelf, ask, greedy, open_worker, random_prompt

SAMPLING = greedy(5, logprobs=0, prompt_logprobs=True)
PROMPTS = [random_prompt(length, length) for length in (70, 9)]


def rounded(x: Tensor) -> Tensor:
    """Each head of each token at the smallest power of two that keeps it within 448, rounded as torch casts."""
    scales = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).double().clamp(min=1e-30) / 448)))
    return ((x.double() / scales).to(torch.float8_e4m3fn).double() * scales).to(x.dtype)


def attend_to_rounded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: object
) -> tuple[Tensor, None]:
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, rounded(key), rounded(value), attention_mask, **options
    )
    return found


def oracle(base: Path, adapter: Path | None, *, rounds: bool = True) -> PreTrainedModel | PeftModel:
    AttentionInterface.register("rounding", attend_to_rounded)
    AttentionMaskInterface.register("rounding", sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if rounds:
        model.set_attn_implementation("rounding")
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def logprobs_of(model: PreTrainedModel | PeftModel, tokens: tuple[int, ...]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def given(answer: Answer) -> Tensor:
    parts = [entry for delta in answer.deltas for entry in delta.prompt_logprobs or ()]
    return torch.tensor([entry.logprob for entry in (*parts[1:], *answer.logprobs)])


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("llama", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("qwen3", 1), ("mistral", 1), ("gpt2", 1), ("llama", 2))
        ),
    ],
)
async def test_on_a_cpu(
    kind: BaseKind, size: int, shelf_of: Callable[[BaseKind], Shelf], base_of: Callable[..., Path]
) -> None:
    """Prompts in parts, asked again from the prefix cache, are as if transformers' attention rounded."""
    shelf = Shelf(base_of(kind)) if kind == "gpt2" else shelf_of(kind)
    versions = [None] if kind == "gpt2" else [None, shelf.version_of("rank16"), shelf.version_of("rank4_qv")]
    asked = [(version, prompt) for version in versions for prompt in PROMPTS]
    async with open_worker(shelf, max_batch_tokens=48, kv_dtype="fp8", tensor_parallel_size=size) as worker:
        first = await asyncio.gather(*(ask(worker, prompt, version, SAMPLING) for version, prompt in asked))
        again = await ask(worker, PROMPTS[0], None, greedy(5, logprobs=0))
    assert again.tokens == first[0].tokens
    assert max(delta.num_cached_tokens for delta in again.deltas) == 64
    for version in versions:
        folder = None if version is None else shelf.folders[version]
        rounding, exact = oracle(shelf.base, folder), oracle(shelf.base, folder, rounds=False)
        for (own, prompt), answer in zip(asked, first, strict=True):
            if own == version:
                tokens = (*prompt, *answer.tokens)
                got = given(answer)
                off = (got - logprobs_of(rounding, tokens)).abs()
                # Where two sums differ in the last bit, few elements are rounded to the other side.
                assert float(off.median()) < 1e-4
                assert float(off.max()) < 0.05
                # What it costs: these weights are much louder than trained ones.
                moved = (got - logprobs_of(exact, tokens)).abs()
                print(
                    f"{kind} {len(prompt)}: {off.max():.5f} off, moved by {moved.mean():.4f}, at most {moved.max():.3f}"
                )
                assert 1e-3 < float(moved.mean()) < 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
async def test_on_a_gpu(kind: BaseKind, base_of: Callable[[BaseKind], Path]) -> None:
    """In graphs and in prompts, with fused layers and without."""
    shelf = Shelf(base_of(kind), dtype="float32")
    model = ModelConfig(id="base", source=str(shelf.base), dtype="float32")
    async with open_worker(shelf, model=model, device="cuda", max_batch_tokens=48, kv_dtype="fp8") as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, None, SAMPLING) for prompt in PROMPTS))
    rounding = oracle(shelf.base, None)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        off = (given(answer) - logprobs_of(rounding, (*prompt, *answer.tokens))).abs()
        assert float(off.mean()) < 5e-3, off


@pytest.mark.gpu
async def test_in_bfloat16_on_a_gpu(base_of: Callable[[BaseKind], Path]) -> None:
    shelf = Shelf(base_of("llama"), dtype="bfloat16")
    model = ModelConfig(id="base", source=str(shelf.base), dtype="bfloat16")
    found = []
    for kind in ("auto", "fp8"):
        async with open_worker(shelf, model=model, device="cuda", kv_dtype=kind) as worker:
            answers = await asyncio.gather(
                *(ask(worker, prompt, None, greedy(1, prompt_logprobs=True)) for prompt in PROMPTS)
            )
        found.append(torch.cat([given(answer)[:-1] for answer in answers]))
    assert float((found[0] - found[1]).abs().mean()) < 0.1
