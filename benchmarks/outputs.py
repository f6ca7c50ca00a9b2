"""What the engine says against transformers + PEFT on the same device, on random weights of a given geometry."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from random_models import MAX_MODEL_LEN, device, write_adapter, write_base, write_weights
from running_engine import MAX_SECONDS, Figures
from transformers import AutoModelForCausalLM

from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.workers.assembly import assemble
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.engine import Delivery, Engine
from lorafleet.workers.model.geometry import TORCH_DTYPES, read_config, read_geometry
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
RANKS = {"a8": 8, "a16": 16, "a64": 64}
NUM_LAYERS = 4


@dataclass(slots=True)
class Answer:
    """One request and all that came of it."""

    adapter: str | None
    prompt: tuple[int, ...]
    made: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of the second token of the prompt and those after it."""
    made_logprobs: list[float] = field(default_factory=list)

    def take(self, delta: GenerateDelta) -> None:
        """A step's part of it."""
        self.made += delta.token_ids
        self.made_logprobs += [each.logprob for each in delta.logprobs or () if each.logprob is not None]
        self.prompt_logprobs += [each.logprob for each in delta.prompt_logprobs or () if each.logprob is not None]


def compare_outputs(
    folder: Path, geometry: str, dtype: Literal["bfloat16", "float16"], lengths: Sequence[int], num_output: int
) -> Figures:
    """Largest and mean differences of logprobs: mixed batches with graphs, alone, and without graphs.

    lengths: of the prompts. The oracle computes each answer's own tokens. `same_*`: share of answers with the tokens of
    the first way.
    """
    layers = {} if geometry == "tiny" else {"num_hidden_layers": NUM_LAYERS}
    base = write_base(folder / "base", geometry, **layers)
    write_weights(base, TORCH_DTYPES[dtype])
    for seed, (name, rank) in enumerate(RANKS.items()):
        write_adapter(folder / name, base, rank, seed)
    model = ModelConfig(id="base", source=str(base), dtype=dtype, max_model_len=MAX_MODEL_LEN)
    with _engine(model, folder) as (engine, inbox):
        mixed = inbox.ask(engine, _questions(model, lengths), num_output, at_once=True)
        alone = inbox.ask(engine, _questions(model, lengths), num_output, at_once=False)
    with (
        patch("lorafleet.workers.assembly.graph_sizes", lambda *_: ()),
        _engine(model, folder) as (engine, inbox),
    ):
        without = inbox.ask(engine, _questions(model, lengths), num_output, at_once=True)
    oracle = _Oracle(base, folder, TORCH_DTYPES[dtype])
    prefill, decode = oracle.differences(mixed)
    return {
        "prefill_max": float(prefill.max()),
        "prefill_mean": float(prefill.mean()),
        "decode_max": float(decode.max()),
        "decode_mean": float(decode.mean()),
        "alone_max": float(np.concatenate(oracle.differences(alone)).max()),
        "without_graphs_max": float(np.concatenate(oracle.differences(without)).max()),
        "same_alone": _same(mixed, alone),
        "same_without_graphs": _same(mixed, without),
        "answers": len(mixed),
    }


def _questions(model: ModelConfig, lengths: Sequence[int]) -> list[Answer]:
    """Every adapter, and none, on prompts of every length."""
    vocabulary, rng = read_config(model).vocab_size, np.random.default_rng(0)
    return [
        Answer(adapter, tuple(rng.integers(10, vocabulary - 10, length).tolist()))
        for length in lengths
        for adapter in (None, *RANKS)
    ]


def _same(some: Sequence[Answer], others: Sequence[Answer]) -> float:
    return float(np.mean([one.made == other.made for one, other in zip(some, others, strict=True)]))


@dataclass(slots=True)
class _Inbox:
    """Sorts deliveries to the answers that they are for."""

    open_answers: dict[str, Answer] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    is_done: threading.Event = field(default_factory=threading.Event)

    def deliver(self, deliveries: list[Delivery]) -> None:
        """On the engine's thread."""
        for request_id, item in deliveries:
            if isinstance(item, GenerateDelta):
                self.open_answers[request_id].take(item)
                if item.finish_reason is None:
                    continue
            else:
                self.errors.append(repr(item))
            del self.open_answers[request_id]
        if not self.open_answers:
            self.is_done.set()

    def ask(self, engine: Engine, answers: list[Answer], num_output: int, *, at_once: bool) -> list[Answer]:
        """The same answers, complete."""
        sampling = SamplingParams(
            temperature=0.0, max_tokens=num_output, ignore_eos=True, logprobs=0, prompt_logprobs=True
        )
        for group in [answers] if at_once else [[answer] for answer in answers]:
            self.is_done.clear()
            self.open_answers = {str(number): answer for number, answer in enumerate(group)}
            for request_id, answer in list(self.open_answers.items()):
                engine.submit(EngineRequest(request_id, answer.adapter, answer.prompt, sampling))
            if not self.is_done.wait(MAX_SECONDS) or self.errors:
                raise RuntimeError(f"{len(self.open_answers)} answers never ended: {self.errors[:3]}")
        return answers


@contextmanager
def _engine(model: ModelConfig, folder: Path) -> Iterator[tuple[Engine, _Inbox]]:
    """An engine with the adapters of `folder`."""
    reader = AdapterReader(read_geometry(model), max(RANKS.values()))
    weights = {name: reader.read(folder / name) for name in RANKS}
    # The engine knows adapters by version; here their names will do.
    weights = {name: replace(each, manifest=replace(each.manifest, version=name)) for name, each in weights.items()}
    inbox = _Inbox()
    parts = assemble(
        worker_id="outputs",
        model=model,
        engine=EngineConfig(prefix_cache=False),
        pool=PoolConfig(max_slots=len(RANKS)),
        fetch=lambda version: weights[version],
        deliver=inbox.deliver,
    )
    parts.engine.start()
    try:
        yield parts.engine, inbox
    finally:
        parts.engine.close()


class _Oracle:
    """transformers + PEFT, a sequence at a time."""

    def __init__(self, base: Path, folder: Path, dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device()).eval()
        first, *others = RANKS
        self._model = PeftModel.from_pretrained(model, folder / first, adapter_name=first).eval()
        for name in others:
            self._model.load_adapter(folder / name, adapter_name=name)

    def differences(self, answers: Sequence[Answer]) -> tuple[Floats, Floats]:
        """Of all prompt tokens' logprobs and of all made tokens', absolute."""
        parts = [self._differences(answer) for answer in answers]
        return np.concatenate([prefill for prefill, _ in parts]), np.concatenate([decode for _, decode in parts])

    @torch.inference_mode()
    def _differences(self, answer: Answer) -> tuple[Floats, Floats]:
        tokens = torch.tensor([[*answer.prompt, *answer.made]], device=device())
        with nullcontext() if answer.adapter else self._model.disable_adapter():
            if answer.adapter:
                self._model.set_adapter(answer.adapter)
            logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1]
        logprobs = logits.float().log_softmax(dim=-1).gather(1, tokens[0, 1:, None])[:, 0].cpu().numpy()
        split = len(answer.prompt) - 1
        expected = (logprobs[:split], logprobs[split:])
        got = (np.array(answer.prompt_logprobs), np.array(answer.made_logprobs))
        prefill, decode = (np.abs(ours - theirs) for ours, theirs in zip(got, expected, strict=True))
        return prefill, decode
