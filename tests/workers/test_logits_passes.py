"""Passes over the head against one pass, to the bit, and against transformers; and how many logits exist at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import nn
from transformers import AutoModelForCausalLM

from lorafleet.kernels.reference import EXACT_ROWS
from lorafleet.workers.assembly import WorkerParts, assemble
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.engine import Delivery
from lorafleet.workers.model import runner, startup
from lorafleet.workers.model.logits import BodyOnce
from lorafleet.workers.model.sampler import Sampler, with_logprobs
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind, make_base
from tests.workers.harness import ENGINE, POOL, Shelf, ask, greedy, open_worker, random_prompt
from tests.workers.test_refusals import SERVED, SHAPE, save_base

CHUNKS = (1, 4, 7, 16, 33)
NUM_TOKENS = 6


def requests_of(shelf: Shelf) -> list[EngineRequest]:
    """For the base and every adapter, long and short, with and without logprobs of the prompt, greedy and drawn."""
    several = []
    for number, version in enumerate([None, *shelf.versions, None, *shelf.versions]):
        sampling = greedy(NUM_TOKENS, logprobs=number % 4, prompt_logprobs=number % 2 == 0)
        if number % 3 == 1:
            sampling = SamplingParams(
                max_tokens=NUM_TOKENS, temperature=0.9, top_p=0.9, seed=number, ignore_eos=True, min_tokens=number % 4
            )
        several.append(EngineRequest(f"r{number}", version, random_prompt(1 + 7 * number % 45, number), sampling))
    return several


class Script:
    """An engine whose requests come all at once, so that its steps are the same each time."""

    def __init__(self, shelf: Shelf, **settings: object) -> None:
        self._delivered: list[Delivery] = []
        self._open: set[str] = set()
        self._is_done = threading.Event()
        self.parts: WorkerParts = assemble(
            worker_id="w",
            model=ModelConfig(id="base", source=str(shelf.base), dtype="float32"),
            engine=ENGINE.model_copy(update={"prefix_cache": "off", **settings}),
            pool=POOL,
            fetch=shelf.weights.__getitem__,
            deliver=self._take,
        )
        self.parts.engine.start()
        for version in shelf.versions:  # one after another, so that each has the same slot each time
            self.play([EngineRequest(version, version, (3, 4), greedy(1))])

    def play(self, requests: Sequence[EngineRequest]) -> list[Delivery]:
        self._delivered, self._open = [], {request.request_id for request in requests}
        self._is_done.clear()
        self.parts.engine.call(lambda: [self.parts.engine.submit(request) for request in requests])
        assert self._is_done.wait(60)
        return self._delivered

    def _take(self, deliveries: list[Delivery]) -> None:
        for request_id, item in deliveries:
            assert isinstance(item, GenerateDelta), item
            self._delivered.append((request_id, structs.replace(item, waits_s=None)))  # times differ
            if item.finish_reason is not None:
                self._open.discard(request_id)
        if not self._open:
            self._is_done.set()


@contextmanager
def playing(shelf: Shelf, **settings: object) -> Iterator[Script]:
    script = Script(shelf, **settings)
    try:
        yield script
    finally:
        script.parts.engine.close()


@pytest.mark.usefixtures("multiplies_rows_alike")
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
@pytest.mark.slow
def test_many_passes_say_what_one_says_bit_for_bit(
    kind: BaseKind, shelf_of: Callable[[BaseKind], Shelf], tmp_path: Path
) -> None:
    """Tokens and logprobs of prompts and of answers, with adapters on the head and one that replaces it."""
    shelf = Shelf(shelf_of(kind).base)
    for folder in shelf_of(kind).folders.values():
        shelf.put(folder)
    shelf.put(make_adapter(tmp_path / "own_head", shelf.base, "rank4_qv", modules_to_save=("lm_head",)))
    with playing(shelf) as script:
        expected = script.play(requests_of(shelf))
    assert any(delta.prompt_logprobs for _, delta in expected if isinstance(delta, GenerateDelta))
    for chunk in CHUNKS:
        with playing(shelf, logits_chunk_tokens=chunk) as script:
            assert script.play(requests_of(shelf)) == expected, chunk


@pytest.mark.parametrize("chunk", [4, 33])
@pytest.mark.slow
def test_no_more_logits_exist_at_once(llama: Shelf, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the head a step is computed once; at it and behind it are the rows of one pass."""
    at_head: list[int] = []
    behind_head: list[int] = []
    in_body: list[int] = []
    monkeypatch.setattr(runner, "with_logprobs", _noting_rows(with_logprobs, behind_head))
    monkeypatch.setattr(Sampler, "sample", _noting_rows(Sampler.sample, behind_head))
    with playing(llama, logits_chunk_tokens=chunk) as script:
        model = script.parts.runner.base.model
        head: nn.Module = model.get_output_embeddings()
        head.register_forward_hook(lambda *args: at_head.append(args[2].shape[-2]))
        model.base_model.layers[0].register_forward_hook(lambda *args: in_body.append(args[2][0].shape[0]))
        behind_head.clear()
        steps = script.parts.engine.stats.num_steps
        script.play(requests_of(llama))
        steps = script.parts.engine.stats.num_steps - steps
    assert len(in_body) == steps
    assert len(at_head) > steps
    assert max(at_head) == max(chunk, EXACT_ROWS)
    assert max(behind_head) == chunk


def _noting_rows(function: Callable[..., Any], noted: list[int]) -> Callable[..., Any]:
    def note(*args: Any) -> Any:
        noted.append(next(len(arg) for arg in args if isinstance(arg, torch.Tensor)))
        return function(*args)

    return note


HEADS: dict[str, dict[str, Any]] = {
    **SERVED,
    "cohere2": {**SERVED["cohere2"], "logit_scale": 0.25},
    "gemma3_text": {**SERVED["gemma3_text"], "final_logit_softcapping": 2.0},
    "granite": {**SHAPE, "logits_scaling": 3.0},
    "gpt2": {"vocab_size": 304, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
"""Kinds of models that do something of their own about their heads: scale, cap, project, or call a part of the body."""


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.slow
async def test_passes_over_any_head(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(save_base(tmp_path, kind, HEADS[kind]))
    prompt = random_prompt(30, 0)
    with caplog.at_level(logging.INFO):
        async with open_worker(shelf, logits_chunk_tokens=7) as worker:
            answer = await ask(worker, prompt, None, greedy(4, logprobs=0, prompt_logprobs=True))
    assert "computed anew" not in caplog.text
    model = AutoModelForCausalLM.from_pretrained(shelf.base, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt + answer.tokens]), use_cache=False).logits[0].log_softmax(-1)
    assert answer.deltas[0].prompt_logprobs is not None
    entries = [*answer.deltas[0].prompt_logprobs[1:], *answer.logprobs]
    for place, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)


async def test_a_body_that_cannot_be_kept_is_computed_for_each_pass(
    llama: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a model's head works in place on what its body left: the probe notices."""

    class Spoiled(BodyOnce):
        def _forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super()._forward(*args, **kwargs)
            left = output.last_hidden_state.clone()
            if self._is_open:
                output.last_hidden_state.zero_()
            return type(output)(last_hidden_state=left)

    sampling = greedy(4, logprobs=1, prompt_logprobs=True)
    version = llama.version_of("embeddings_all")
    async with open_worker(llama, logits_chunk_tokens=5) as worker:
        expected = await ask(worker, random_prompt(30, 0), version, sampling)
    assert "computed anew" not in caplog.text
    monkeypatch.setattr(startup, "BodyOnce", Spoiled)
    with caplog.at_level(logging.INFO):
        async with open_worker(llama, logits_chunk_tokens=5) as worker:
            answer = await ask(worker, random_prompt(30, 0), version, sampling)
    assert "computed anew" in caplog.text
    assert answer.tokens == expected.tokens
    assert answer.logprobs == expected.logprobs
    assert answer.deltas[0].prompt_logprobs == expected.deltas[0].prompt_logprobs


@pytest.mark.gpu
def test_on_a_gpu_passes_take_less_memory_and_say_the_same(tmp_path: Path) -> None:
    shelf = Shelf(make_base(tmp_path / "base", vocab_size=50_000))
    version = shelf.put(make_adapter(tmp_path / "adapter", shelf.base, "embeddings_all"))
    request = EngineRequest("r", version, random_prompt(400, 0), greedy(4, logprobs=1, prompt_logprobs=True))
    peaks, said = [], []
    for chunk in (16, 512):
        with playing(shelf, device="cuda", max_batch_tokens=512, logits_chunk_tokens=chunk) as script:
            script.play([request])
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            said.append(script.play([request]))
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < peaks[1] / 4, peaks
    for (_, one), (_, other) in zip(*said, strict=True):
        assert isinstance(one, GenerateDelta)
        assert isinstance(other, GenerateDelta)
        assert one.token_ids == other.token_ids
        for entry, again in zip(one.prompt_logprobs or (), other.prompt_logprobs or (), strict=True):
            assert entry.logprob == pytest.approx(again.logprob, abs=1e-4)
