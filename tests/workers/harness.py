"""A worker in this process, with adapters that PEFT made, and what it answered."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from lorafleet.adapter_store.base_weights import CheckpointWeights
from lorafleet.adapter_store.conversations import BaseTokens
from lorafleet.adapter_store.manifest import AdapterWeights, Dtype
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.model.geometry import read_geometry
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams, TokenLogprobs
from lorafleet.workers.worker import Worker
from tests.support.bases import VOCAB_SIZE
from tests.support.oracle import prompt_logprobs_with_peft

GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
ENGINE = EngineConfig(device="cpu", max_batch_tokens=256, kv_bytes=8 << 20, kv_page_tokens=16)
POOL = PoolConfig(max_rank=64, pool_bytes=32 << 20)

_ids = itertools.count()


class Shelf:
    """Adapters by version, as the adapter store would hand them out."""

    def __init__(
        self, base: Path, max_rank: int = 64, dtype: Dtype = "float32", base_tokens: BaseTokens | None = None
    ) -> None:
        self.base = base
        self._reader = AdapterReader(
            read_geometry(ModelConfig(id="base", source=str(base), dtype=dtype), "cpu"),
            max_rank,
            CheckpointWeights(base),
            base_tokens,
        )
        self.weights: dict[str, AdapterWeights] = {}
        self.folders: dict[str, Path] = {}
        self.num_fetches = 0

    def put(self, folder: Path) -> str:
        """Read the adapter in `folder`; its version."""
        weights = self._reader.read(folder)
        self.weights[weights.manifest.version] = weights
        self.folders[weights.manifest.version] = folder
        return weights.manifest.version

    def put_huge(self, version: str, factor: float) -> str:
        """A copy of an adapter whose weights are finite, but so large that activations overflow."""
        weights = self.weights[version]
        manifest = replace(weights.manifest, version=f"huge-{version}")
        flat = np.multiply(weights.flat, factor, dtype=weights.flat.dtype)
        self.weights[manifest.version] = replace(weights, manifest=manifest, flat=flat)
        return manifest.version

    @property
    def versions(self) -> list[str]:
        """In the order in which they were put."""
        return list(self.weights)

    def version_of(self, name: str) -> str:
        """The version that was read from a folder of that name."""
        return next(version for version, folder in self.folders.items() if folder.name == name)

    async def fetch(self, version: str) -> AdapterWeights:
        self.num_fetches += 1
        await asyncio.sleep(0)
        return self.weights[version]


@dataclass
class Answer:
    """All that came of one request."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    deltas: list[GenerateDelta] = field(default_factory=list)

    @property
    def last(self) -> GenerateDelta:
        return self.deltas[-1]

    def add(self, delta: GenerateDelta) -> None:
        self.tokens += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs or ()
        self.deltas.append(delta)


def request_of(prompt: Sequence[int], version: str | None = None, sampling: SamplingParams = GREEDY) -> EngineRequest:
    return EngineRequest(f"request-{next(_ids)}", version, tuple(prompt), sampling)


def greedy(max_tokens: int = 64, **settings: object) -> SamplingParams:
    """Greedy decoding that nothing ends early."""
    return SamplingParams.model_validate({**GREEDY.model_dump(), "max_tokens": max_tokens, **settings})


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Tokens of the tiny bases, none of them special."""
    tokens = torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))
    return tuple(tokens.tolist())


async def ask(
    worker: Worker, prompt: Sequence[int], version: str | None = None, sampling: SamplingParams = GREEDY
) -> Answer:
    """Read one stream to its end."""
    answer = Answer()
    async for delta in worker.generate(request_of(prompt, version, sampling)):
        answer.add(delta)
    return answer


def assert_pefts(shelf: Shelf, version: str | None, prompt: tuple[int, ...], answer: Answer, tolerance: float) -> None:
    """Each token of a greedy answer is among the likeliest, and every logprob, the prompt's too, is what PEFT gives."""
    tokens = (*prompt, *answer.tokens)
    expected = prompt_logprobs_with_peft(shelf.base, shelf.folders.get(version or ""), tokens)[:-1]
    chosen = expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    given = answer.deltas[0].prompt_logprobs
    assert given is not None
    found = torch.tensor([entry.logprob for entry in (*given[1:], *answer.logprobs)])
    assert (found - chosen).abs().max() < tolerance
    assert (expected.max(-1).values - chosen)[len(prompt) - 1 :].max() <= tolerance


@asynccontextmanager
async def open_worker(
    shelf: Shelf,
    *,
    engine: EngineConfig = ENGINE,
    pool: PoolConfig = POOL,
    model: ModelConfig | None = None,
    fetch: Callable[[str], Awaitable[AdapterWeights]] | None = None,
    ends_well: bool = True,
    **engine_settings: object,
) -> AsyncIterator[Worker]:
    """A worker over the shelf's base; `engine_settings` replace fields of `engine`.

    Closed at the end; with `ends_well` it must be healthy and idle then.
    """
    worker = Worker(
        worker_id="worker-0",
        model=model or ModelConfig(id="base", source=str(shelf.base)),
        engine=EngineConfig.model_validate(engine.model_dump() | engine_settings),
        pool=pool,
        fetch=fetch or shelf.fetch,
    )
    try:
        yield worker
        if ends_well:
            worker.check_health()
            await assert_idle(worker)
    finally:
        worker.close()


async def assert_idle(worker: Worker) -> None:
    """Nothing is left of any request: no sequence, no lease, no KV page."""
    state = await worker.state()
    assert (state.running, state.waiting, state.leases, state.kv_pages.used) == (0, 0, 0, 0), state
    assert state.state_slots is None or state.state_slots.used == 0
