"""Prompts beyond the graphs, which cuDNN attends to on Hopper where its package is installed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import pytest
import torch

from lorafleet.kernels import attention_cudnn
from lorafleet.kernels.attention_cudnn import PromptAttention
from lorafleet.workers.config import ModelConfig
from tests.support.adapters import make_adapter
from tests.support.bases import make_base
from tests.support.oracle import prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

LENGTHS = (3000, 1100, 2500)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.gpu
async def test_long_prompts_match_peft(
    kind: Literal["llama", "mistral"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces and beside each other, of the base and of an adapter: cuDNN is as near to PEFT as the Triton kernel."""
    base = make_base(tmp_path / "base", kind, max_position_embeddings=4096, head_dim=64)
    shelf = Shelf(base, dtype="bfloat16")
    version = shelf.put(make_adapter(tmp_path / "adapter", base))
    prompts = [random_prompt(length, length) for length in LENGTHS]
    asked = [(prompt, name) for prompt in prompts for name in (None, version)]
    expected = []
    for prompt, name in asked:
        wanted = prompt_logprobs_with_peft(base, shelf.folders.get(name or ""), prompt)[:-1]
        expected.append(wanted.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    num_calls, own = 0, PromptAttention.extend

    def counted(*args: object) -> bool:
        nonlocal num_calls
        is_done = own(*args)  # type: ignore[arg-type]
        num_calls += is_done
        return is_done

    monkeypatch.setattr(PromptAttention, "extend", counted)

    async def errors() -> torch.Tensor:
        model = ModelConfig(id="base", source=str(base), dtype="bfloat16", max_model_len=4096)
        sampling = greedy(1, prompt_logprobs=True)
        async with open_worker(shelf, model=model, device="cuda", max_batch_tokens=4096, kv_bytes=64 << 20) as worker:
            answers = await asyncio.gather(*(ask(worker, prompt, name, sampling) for prompt, name in asked))
        means = []
        for answer, wanted in zip(answers, expected, strict=True):
            given = [entry for delta in answer.deltas for entry in delta.prompt_logprobs or ()]
            found = torch.tensor([entry.logprob for entry in given[1:]])
            means.append((found - wanted).abs().mean())
        return torch.stack(means)

    by_cudnn = await errors()
    if not num_calls:
        pytest.skip("cuDNN's package is not installed")
    calls_before = num_calls
    monkeypatch.setattr(attention_cudnn, "find", lambda **_: None)
    by_triton = await errors()
    assert num_calls == calls_before
    assert (by_cudnn < 1.3 * by_triton + 1e-3).all(), (by_cudnn, by_triton)
