"""Layers that know whose adapter a row has: the segments they read, and rows that are not those that were prepared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafleet.kernels import ops
from lorafleet.kernels.segments import Segments, build_segments
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.model import lora_layers
from lorafleet.workers.model.lora_context import LoraContext
from tests.kernels.paged import paged_embedding, paged_linear
from tests.support.bases import VOCAB_SIZE, BaseKind
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

WIDTH = 64
ROWS = 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextmanager
def noting_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Segments]]]:
    """(entry point, segments) of every call of a layer, in their order."""
    noted: list[tuple[str, Segments]] = []

    def noting(name: str) -> Callable[..., object]:
        call: Callable[..., object] = getattr(ops, name)

        def note(*arguments: object) -> object:
            noted.extend((name, each) for each in arguments if isinstance(each, Segments))
            return call(*arguments)

        return note

    with monkeypatch.context() as patch:
        for name in ("add_lora", "embed"):
            patch.setattr(ops, name, noting(name))
        yield noted


async def test_the_embedding_reads_the_segments_that_all_layers_read(
    llama: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made once a step; the head alone has others, derived for the rows that reach it."""
    version = llama.version_of("embeddings_all")
    async with open_worker(llama) as worker:
        with noting_segments(monkeypatch) as noted:
            await ask(worker, random_prompt(30, 0), version, greedy(3))
            num_steps = worker.stats.num_steps
    per_step = len(noted) // num_steps
    assert per_step * num_steps == len(noted)
    steps = [noted[start : start + per_step] for start in range(0, len(noted), per_step)]
    for number, ((first, segments), *layers, (_, of_head)) in enumerate(steps):
        assert first == "embed"
        assert [name for name, _ in layers] == ["add_lora"] * 4 * 2
        assert all(each is segments for _, each in layers)
        assert segments.num_rows == (30 if number == 0 else 1)
        assert of_head is not segments
        assert of_head.num_rows == 1, "of a prompt the last row alone reaches the head"


@pytest.fixture
def tiny(base_of: Callable[[BaseKind], Path]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_of("llama"), dtype=torch.float32)
    return model


def substituted(model: PreTrainedModel, device: torch.device) -> LoraContext:
    """A head, a projection and the embedding of the model know about two adapters now."""
    rng, context = np.random.default_rng(0), LoraContext()
    model.to(device)
    for name, width in (("lm_head", VOCAB_SIZE), ("model.layers.0.self_attn.o_proj", WIDTH)):
        paged = paged_linear(rng, in_dim=WIDTH, widths=(width,), ranks=[[4], [2]], dtype=torch.float32, device=device)
        lora_layers.substitute_projections(model, (name,), paged.weights, context)
    embedding = paged_embedding(
        rng,
        num_embeddings=VOCAB_SIZE,
        width=WIDTH,
        ranks=[4, 2],
        page_elements=320,
        dtype=torch.float32,
        device=device,
    )
    lora_layers.substitute_embedding(model, "model.embed_tokens", embedding.weights, context)
    return context


@pytest.mark.parametrize("device_name", DEVICES)
@pytest.mark.parametrize("num_rows", [1, 2, 4, 30])
@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.self_attn.o_proj", "model.embed_tokens"])
@torch.no_grad()
def test_rows_that_were_not_prepared_are_an_error_that_names_the_module(
    tiny: PreTrainedModel, name: str, num_rows: int, device_name: str
) -> None:
    """Never a wrong adapter: not with fewer rows, not with more, neither at the head nor elsewhere."""
    device = torch.device(device_name)
    context = substituted(tiny, device)
    prepared = build_segments(np.array([1, 0, 1], dtype=np.int32), device=device)
    module = tiny.get_submodule(name)
    is_embedding = name.endswith("embed_tokens")

    def rows(count: int) -> Tensor:
        if is_embedding:
            return torch.arange(count, device=device)[None]
        return torch.randn(1, count, WIDTH, device=device)

    # The other kind of rows has as many as are given: it is not their segments that the module reads.
    others = build_segments(np.zeros(num_rows, dtype=np.int32), device=device)
    is_head = name == "lm_head"
    context.segments, context.logits_segments = (others, prepared) if is_head else (prepared, others)
    with pytest.raises(UnsupportedModel, match=re.escape(f"{name} is given {num_rows} rows where a step has {ROWS}:")):
        module(rows(num_rows))
    assert module(rows(ROWS)).shape[:2] == (1, ROWS)
