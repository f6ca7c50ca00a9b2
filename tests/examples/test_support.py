"""The factories keep their promises: greedy text varied and without ties, adapters that change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.adapters import make_adapter
from tests.support.bases import BASE_KINDS, BaseKind
from tests.support.oracle import generate_with_peft, prompt_logprobs_with_peft


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_greedy_text_is_varied_and_adapters_change_it(
    kind: BaseKind, base_of: Callable[[BaseKind], Path], tmp_path: Path
) -> None:
    base = base_of(kind)
    adapter = make_adapter(tmp_path / "adapter", base, "rank16")
    prompt = AutoTokenizer.from_pretrained(base)("The quick brown fox").input_ids
    plain, adapted = (generate_with_peft(base, path, prompt, 32) for path in (None, adapter))
    for generation in (plain, adapted):
        assert len(generation.tokens) == 32
        assert len(set(generation.tokens)) > 8
        assert generation.smallest_gap > 1e-4
    assert plain.tokens != adapted.tokens
    whole = prompt_logprobs_with_peft(base, adapter, [*prompt, *adapted.tokens])
    assert (whole[len(prompt) - 1 : -1] - adapted.logprobs).abs().max() < 1e-4


def test_another_seed_is_another_version(base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    first, second, again = (
        make_adapter(tmp_path / name, base_of("llama"), "rank4_qv", seed=seed)
        for name, seed in (("first", 1), ("second", 2), ("again", 1))
    )
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, second, again)]
    assert weights[0] == weights[2] != weights[1]
