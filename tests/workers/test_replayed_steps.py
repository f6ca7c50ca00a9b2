"""What a captured step computes, on a CPU: the same layout, computed anew where a GPU would replay a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafleet.workers import model_parts
from lorafleet.workers.model.runner import ModelRunner, StepInFlight
from lorafleet.workers.model.startup import start_runner
from lorafleet.workers.step import forms as step_forms
from lorafleet.workers.step.batch import StepInputs
from lorafleet.workers.step.forms import GraphForm, forms_with_extras
from lorafleet.workers.step.layout import blank_batch, chunk_bounds
from lorafleet.workers.step.message import StepHeader, StepMessage
from tests.workers.harness import Shelf
from tests.workers.test_step_in_flight import ask_all, assert_same

BY_ROW = tuple(GraphForm(n, n, 0) for n in (4, 16, 64, 256))
"""They get as many pages as the longest sequence has."""
BY_PROMPT = (*BY_ROW[:2], *(GraphForm(n, 40, 0, 16) for n in (64, 256)))


@dataclass(frozen=True)
class Replayed:
    """Stands for a graph: its inputs are written into its buffer, and computed from there."""

    packed: Tensor
    inputs: StepInputs
    compute: Callable[[StepInputs], Tensor]

    def replay(self) -> Tensor:
        return self.compute(self.inputs)


def replay(monkeypatch: pytest.MonkeyPatch, forms: tuple[GraphForm, ...]) -> list[StepHeader]:
    """From here on steps are computed as graphs of these forms would; returns their headers, as they come."""
    if forms is BY_PROMPT:
        monkeypatch.setattr(step_forms, "FEW_KEYS", 0)
    headers: list[StepHeader] = []
    launch = ModelRunner.launch

    def start(*arguments: Any, **options: Any) -> ModelRunner:
        runner = start_runner(*arguments, **options)
        runner.graph_forms = tuple(replace(form, num_pages=runner.max_pages) for form in forms)
        runner.extra_forms = forms_with_extras(runner.graph_forms)
        runner.null_pages = runner.cache.allocate(1)
        return runner

    def step(runner: ModelRunner, message: StepMessage, *rest: Any) -> StepInFlight:
        header = message.header
        if header.form is not None:
            headers.append(header)
            packed = torch.full((header.size,), -7, dtype=torch.int32)
            graph: Any = Replayed(packed, message.view(packed), runner.forward)
            bounds = chunk_bounds(header.form.num_rows, runner.pool.num_slots)
            has_lora = header.graph_key[1] > 0
            captured = blank_batch(
                header.form,
                null_page=runner.null_pages[0],
                has_lora=has_lora,
                max_chunks=header.graph_key[1] if has_lora else bounds[0],
                max_logits=runner.pass_rows[1],
            ).header
            assert (header.graph_key[1] in bounds) == has_lora
            assert (captured.graph_key, captured.size) == (header.graph_key, header.size)
            assert captured.num_decodes == header.num_decodes
            runner.graphs = {header.graph_key: graph}
        return launch(runner, message, *rest)

    monkeypatch.setattr(model_parts, "start_runner", start)
    monkeypatch.setattr(ModelRunner, "launch", step)
    return headers


@pytest.mark.parametrize("forms", [BY_ROW, BY_PROMPT], ids=["by row", "by prompt"])
@pytest.mark.slow
async def test_the_answers_are_the_same(
    llama: Shelf, monkeypatch: pytest.MonkeyPatch, forms: tuple[GraphForm, ...]
) -> None:
    """Decodes and prompts beside them, in batches that fit a graph and others."""
    expected, _ = await ask_all(llama)
    replayed = replay(monkeypatch, forms)
    answers, _ = await ask_all(llama)
    assert_same(answers, expected)
    some = list(replayed)
    assert {header.num_rows for header in some} >= {16, 64, 256}
    assert any(header.num_prompt_rows for header in some)
    assert any(header.form is not None and header.form.num_prompts for header in some) == (forms is BY_PROMPT)
    assert any(sum(header.num_sampled) < header.num_rows < len(header.num_sampled) + 64 for header in some)
    replayed.clear()
    narrow, _ = await ask_all(llama, max_batch_tokens=24, logits_chunk_tokens=5)
    assert replayed
    assert all(sum(header.num_sampled) + header.num_prompt_rows <= 5 for header in replayed)
    assert_same(narrow, expected)
