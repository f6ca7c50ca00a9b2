"""Entries of the ring: real steps come out as they went in, less what the first rank alone needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from lorafleet.workers.config import EngineConfig, ModelConfig
from lorafleet.workers.group.entries import (
    Allocated,
    Change,
    Freed,
    Published,
    Zeroed,
    parts_of_change,
    parts_of_step,
    read_entry,
)
from lorafleet.workers.model.runner import ModelRunner, StepInFlight
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.step.layout import blank_batch
from lorafleet.workers.step.message import StepMessage
from lorafleet.workers.step.sampling import NO_SAMPLING
from tests.workers.harness import Shelf, ask, open_worker
from tests.workers.test_step_in_flight import requests


def joined(parts: tuple[bytes, bytes | memoryview]) -> memoryview:
    return memoryview(b"".join(parts))


def assert_same(message: StepMessage) -> None:
    read = read_entry(joined(parts_of_step(message)))
    assert isinstance(read, StepMessage)
    sampled = (message.header.num_sampled_rows,)
    assert read.header == replace(message.header, num_sampled=sampled, pooled=())
    assert read.packed.tolist() == message.packed.tolist()
    assert read.sampling is NO_SAMPLING
    assert read.header.size == message.header.size


async def test_steps_of_every_kind_come_out_as_they_went_in(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[StepMessage] = []
    launch = ModelRunner.launch

    def keep(
        runner: ModelRunner, message: StepMessage, previous: StepInFlight | None, fill: Callable[[], None]
    ) -> StepInFlight:
        messages.append(message)
        return launch(runner, message, previous, fill)

    monkeypatch.setattr(ModelRunner, "launch", keep)
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
    engine = EngineConfig(device="cpu", max_batch_tokens=40, logits_chunk_tokens=6, kv_bytes=1 << 20)
    async with open_worker(llama, model=ModelConfig(id="b", source=str(llama.base)), engine=engine) as worker:
        await asyncio.gather(*(ask(worker, *request) for request in requests(llama)))
    assert len(messages) > 30
    for message in messages:
        assert_same(message)


def test_a_step_of_a_graph_names_its_form() -> None:
    for form in (
        GraphForm(8, 8, 3, has_extras=True),
        GraphForm(8, 8, 3, skips_experts=True),
        GraphForm(8, 4, 3, num_prompts=2),
    ):
        assert_same(blank_batch(form, null_page=5, has_lora=True, max_chunks=4, max_logits=6))


def test_changes_come_out_as_they_went_in(llama: Shelf) -> None:
    manifest = llama.weights[llama.versions[0]].manifest
    changes: list[Change] = [Allocated(manifest, 3, 7), Published(3), Freed(3), Zeroed((1, 5))]
    for change in changes:
        assert read_entry(joined(parts_of_change(change))) == change
