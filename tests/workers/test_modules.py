"""LoRA on every module of a base, alone and together, whichever way a config names it: what PEFT computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.support.adapters import ALL_SEVEN, make_adapter
from tests.support.bases import BaseKind
from tests.support.oracle import load_with_peft, prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

EVERYTHING = (*ALL_SEVEN, "embed_tokens", "lm_head")
TARGETS: dict[str, dict[str, Any]] = {
    **{f"only_{name}": {"target_modules": [name]} for name in EVERYTHING},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "everything": {"target_modules": list(EVERYTHING)},
    "all_linear": {"target_modules": "all-linear"},
    "all_linear_but": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "full_names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "lm_head"]},
    "regex": {"target_modules": r".*\.layers\.\d+\.self_attn\.(q|o)_proj"},
    "regex_of_the_ends": {"target_modules": r"(model\.embed_tokens|lm_head|.*\.1\.mlp\.gate_proj)"},
    "list_but_regex": {"target_modules": list(EVERYTHING), "exclude_modules": r".*\.0\..*|lm_head"},
    "some_layers": {"target_modules": ["v_proj", "embed_tokens"], "layers_to_transform": [1]},
}
"""Fields of a LoraConfig -> what they say which modules are adapted."""


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
async def test_every_module_as_peft_computes_it(
    kind: BaseKind, base_of: Callable[[BaseKind], Path], tmp_path: Path
) -> None:
    """All adapters in one batch, prefilled in chunks; each must change what is said."""
    shelf = Shelf(base_of(kind))
    versions = {
        name: shelf.put(make_adapter(tmp_path / name, shelf.base, r=3 + number, strength=1.5, **fields))
        for number, (name, fields) in enumerate(TARGETS.items())
    }
    prompt = random_prompt(21, 0)
    sampling = greedy(6, logprobs=3, prompt_logprobs=True)
    async with open_worker(shelf, max_batch_tokens=64) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for version in versions.values()))
    for (name, version), answer in zip(versions.items(), answers, strict=True):
        model = load_with_peft(shelf.base, shelf.folders[version])
        wrapped = {name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
        assert {module.name for module in shelf.weights[version].manifest.modules} == wrapped, name
        tokens = prompt + answer.tokens
        expected = prompt_logprobs_with_peft(shelf.base, shelf.folders[version], tokens)
        base = prompt_logprobs_with_peft(shelf.base, None, tokens)
        assert (expected - base).abs().max() > 0.1, name
        assert answer.deltas[0].prompt_logprobs is not None
        entries = [*answer.deltas[0].prompt_logprobs[1:], *answer.logprobs]
        got = torch.tensor([value for entry in entries for value in (entry.logprob, *(top for _, top in entry.top))])
        ids = torch.tensor([[entry.token_id, *(token for token, _ in entry.top)] for entry in entries])
        torch.testing.assert_close(got.view(ids.shape), expected[:-1].gather(1, ids), atol=1e-4, rtol=0)
