"""A step's message in another process: the runner there has no scheduler, and makes the same tokens."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import pickletools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights
from lorafleet.workers.assembly import assemble
from lorafleet.workers.config import EngineConfig, ModelConfig
from lorafleet.workers.detokenizer import Detokenizer
from lorafleet.workers.memory.adapter_pool import AdapterPool, Allocation, UploadedAdapter
from lorafleet.workers.model.runner import ModelRunner, StepInFlight
from lorafleet.workers.model.sampler import Chosen
from lorafleet.workers.request import EngineRequest, SamplingParams, StructuredOutputs
from lorafleet.workers.sequence import ScheduledRows, Sequence
from lorafleet.workers.step.message import StepHeader, StepMessage
from tests.workers.harness import ENGINE, POOL, Shelf, ask, greedy, open_worker, random_prompt
from tests.workers.test_step_in_flight import PAGE_BYTES, requests

SCARCE = EngineConfig(device="cpu", max_batch_tokens=40, logits_chunk_tokens=6, kv_bytes=11 * PAGE_BYTES)
DIGITS = StructuredOutputs(regex="[0-9]{6,20}")


def model_of(base: Path) -> ModelConfig:
    return ModelConfig(id="base", source=str(base), max_model_len=128)


def numbers_of(chosen: Chosen | None) -> dict[str, Any]:
    """Token ids, exact, and their logprobs."""
    if chosen is None:
        return {}
    logprobs = None if chosen.logprobs is None else chosen.logprobs.tolist()
    return {"token_ids": chosen.token_ids.tolist(), "logprobs": logprobs}


def run_rank(connection: Connection, base: Path, weights: dict[str, AdapterWeights]) -> None:
    """Another rank: told of adapters and of steps, in order, and of nothing else."""
    parts = assemble(
        worker_id="rank-1",
        model=model_of(base),
        engine=SCARCE,
        pool=POOL,
        fetch=weights.__getitem__,
        deliver=lambda _: None,
    )
    connection.send("ready")
    allocations: dict[str, Allocation] = {}
    previous: StepInFlight | None = None
    while (received := pickle.loads(connection.recv_bytes())) is not None:
        what, value = received
        if what == "allocate":
            allocations[value] = parts.pool.allocate(weights[value].manifest)
        elif what == "publish":
            parts.pool.publish(parts.pool.upload(allocations[value], weights[value]))
        else:
            previous = parts.runner.launch(value, previous)
            previous.wait()
            connection.send((numbers_of(previous.sampled), numbers_of(previous.prompts)))


@dataclass
class Rank:
    """The other process, and what both made of each step."""

    connection: Connection
    headers: list[StepHeader] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    """Modules whose names the messages carry."""
    here: list[Any] = field(default_factory=list)
    there: list[Any] = field(default_factory=list)
    changed: list[StepHeader] = field(default_factory=list)
    """Steps whose message a runner has written to."""

    def send(self, what: str, value: object) -> bytes:
        sent = pickle.dumps((what, value))
        self.connection.send_bytes(sent)
        return sent


@contextmanager
def other_rank(monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> Iterator[Rank]:
    """From here on every step and adapter of this process also goes to another one."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_rank, args=(theirs, shelf.base, shelf.weights), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.recv() == "ready"
        rank = Rank(ours)
        allocate, publish, launch = AdapterPool.allocate, AdapterPool.publish, ModelRunner.launch

        def allocate_both(pool: AdapterPool, manifest: AdapterManifest) -> Allocation:
            rank.send("allocate", manifest.version)
            return allocate(pool, manifest)

        def publish_both(pool: AdapterPool, uploaded: UploadedAdapter) -> None:
            rank.send("publish", uploaded.allocation.manifest.version)
            publish(pool, uploaded)

        def launch_both(
            runner: ModelRunner, message: StepMessage, previous: StepInFlight | None, fill_masks: Callable[[], None]
        ) -> StepInFlight:
            fill_masks()  # the other rank samples too
            sent = rank.send("step", message)
            rank.headers.append(message.header)
            rank.named |= {str(value) for code, value, _ in pickletools.genops(sent) if "UNICODE" in code.name}
            step = launch(runner, message, previous)
            if pickle.dumps(("step", message)) != sent:
                rank.changed.append(message.header)
            rank.here.append((numbers_of(step.sampled), numbers_of(step.prompts)))
            rank.there.append(ours.recv())
            return step

        monkeypatch.setattr(AdapterPool, "allocate", allocate_both)
        monkeypatch.setattr(AdapterPool, "publish", publish_both)
        monkeypatch.setattr(ModelRunner, "launch", launch_both)
        yield rank
        ours.send_bytes(pickle.dumps(None))
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


async def test_another_process_makes_the_same_tokens(llama: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests of every kind, with a step in flight, preempted and in passes over the head."""
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
    wanted = requests(llama)
    wanted.append((random_prompt(9, 1), llama.versions[2], greedy(20, structured_outputs=DIGITS)))
    async with open_worker(llama, model=model_of(llama.base), engine=SCARCE) as worker:
        with other_rank(monkeypatch, llama) as rank:
            answers = await asyncio.gather(*(ask(worker, *request) for request in wanted))
    assert all(answer.tokens for answer in answers)
    assert answers[-1].text.isdigit()
    headers = rank.headers
    assert len(headers) > 100
    assert any(header.has_pending for header in headers)
    assert any(header.num_prompt_rows for header in headers)
    assert any(header.segments.num_lora_chunks > 2 for header in headers)
    assert any(len(header.passes) > 1 for header in headers)
    assert any(0 in header.num_sampled for header in headers), "a part of a prompt that chooses nothing"
    assert not rank.changed
    for here, there in zip(rank.here, rank.there, strict=True):
        for ours, theirs in zip(here, there, strict=True):
            assert ours.get("token_ids") == theirs.get("token_ids")
            assert (ours.get("logprobs") or []) == pytest.approx(theirs.get("logprobs") or [], abs=1e-5)
    ours_named = {name for name in rank.named if name.startswith("lorafleet.")}
    assert ours_named == {
        "lorafleet.kernels.segments",
        *(f"lorafleet.workers.step.{name}" for name in ("message", "passes", "sampling")),
    }


@pytest.mark.parametrize(
    "sampling",
    [
        greedy(12, logprobs=1, logit_bias={7: 4.0}, min_tokens=5),
        SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=5, ignore_eos=True),
    ],
    ids=["greedy", "drawn"],
)
async def test_several_rows_of_a_sequence_choose_as_one_by_one(llama: Shelf, sampling: SamplingParams) -> None:
    """A whole answer as guessed tokens: each row chooses what came after it."""
    prompt = random_prompt(21, 3)
    async with open_worker(llama) as worker:
        expected = (await ask(worker, prompt, None, sampling)).tokens
    parts = assemble(
        worker_id="w",
        model=ModelConfig(id="base", source=str(llama.base)),
        engine=ENGINE,
        pool=POOL,
        fetch=llama.weights.__getitem__,
        deliver=lambda _: None,
    )
    sequences = []
    for number in range(2):
        tokens = [*prompt, *expected[:-1]]
        sequence = Sequence(
            request=EngineRequest(f"r{number}", None, prompt, sampling),
            arrival_s=0.0,
            max_tokens=12,
            seed=sampling.seed or 0,
            detokenizer=Detokenizer(None, (), ()),
            token_ids=tokens,
            kv_pages=parts.cache.allocate(parts.cache.pages_for(len(tokens))),
        )
        sequences.append(sequence)
    counts = (len(expected), 4)
    scheduled = [ScheduledRows(one, one.num_uncomputed, count) for one, count in zip(sequences, counts, strict=True)]
    built = parts.engine._batches.build(scheduled)
    assert built.message.header.num_sampled == counts
    step = parts.runner.launch(built.message, None)
    step.wait()
    assert step.sampled is not None
    assert tuple(step.sampled.token_ids.tolist()) == (*expected, *expected[-4:])
