"""Workers and a store that live in the test's process: deterministic answers, and every way to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorafleet.adapter_store.errors import UnknownAdapter
from lorafleet.adapter_store.manifest import AdapterChat
from lorafleet.cluster.errors import StoreUnavailable, WorkerGone
from lorafleet.cluster.serving.dispatch import Sink
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.cluster.wire import NamedVersion, NamesAt
from lorafleet.workers.request import EngineRequest, GenerateDelta, TokenLogprobs
from tests.support.bases import MAX_LENGTH, VOCAB_SIZE, make_tokenizer

VERSIONS = {"shout": "aa" * 32, "whisper": "bb" * 32}


def make_prompts(max_model_len: int = MAX_LENGTH) -> Prompts:
    """The tiny bases' tokenizer and bounds."""
    return Prompts(make_tokenizer(), vocab_size=VOCAB_SIZE, max_model_len=max_model_len)


def answer_token_ids(request: EngineRequest, prompts: Prompts) -> list[int]:
    """What the fake workers answer: a text that depends on version, prompt and seed; tokens without the last."""
    who = (request.version or "base")[:4]
    text = f" {who} read {len(request.prompt_token_ids)} tokens, seed {request.sampling.seed}; wörld 🦊 over."
    assert prompts.tokenizer is not None
    token_ids: list[int] = prompts.tokenizer(text)["input_ids"]
    return token_ids


@dataclass(slots=True)
class FakeWorkers:
    """Any number of workers. `fail` decides, for a worker and the number of deltas sent, whether to raise instead."""

    prompts: Prompts
    worker_ids: Sequence[str] = ("w0", "w1")
    fail: Callable[[str, int], Exception | None] = lambda worker_id, num_sent: None
    hang_after: int | None = None
    """Deltas after which a stream waits until it is cancelled."""
    refuse: Exception | None = None
    """What every call meets before it reaches a worker."""
    started: list[tuple[str, EngineRequest]] = field(default_factory=list)
    num_cancelled: int = 0
    num_open: int = 0
    only_resident: list[bool] = field(default_factory=list)
    """Of each start, whether it had to go where the adapter is."""

    def generate(self, request: EngineRequest, excluded: frozenset[str], *, only_resident: bool = False) -> FakeStream:
        self.only_resident.append(only_resident)
        worker_id = next((worker for worker in self.worker_ids if worker not in excluded), self.worker_ids[0])
        self.started.append((worker_id, request))
        self.num_open += 1
        return FakeStream(self, worker_id, request)


class FakeStream:
    """One sequence."""

    def __init__(self, workers: FakeWorkers, worker_id: str, request: EngineRequest) -> None:
        self._workers = workers
        self._worker_id = worker_id
        self._deltas = self._make(request)
        self._num_sent = 0
        self._is_open = True
        self._sink: Sink = lambda delta: False

    @property
    def worker_id(self) -> str | None:
        return self._worker_id

    async def next(self) -> GenerateDelta:
        while (delta := await self._made()).finish_reason is None and self._sink(delta):
            pass
        return delta

    async def _made(self) -> GenerateDelta:
        await asyncio.sleep(0)
        if self._workers.refuse is not None:
            raise self._workers.refuse
        if self._num_sent == self._workers.hang_after:
            await asyncio.Event().wait()
        error = self._workers.fail(self._worker_id, self._num_sent)
        if error is not None:
            raise error
        delta = next(self._deltas, None)
        if delta is None:
            raise WorkerGone("ended early")
        self._num_sent += 1
        if delta.finish_reason is not None:
            self._close()
        return delta

    def pour_into(self, sink: Sink) -> None:
        self._sink = sink

    def cancel(self) -> None:
        if self._is_open:
            self._workers.num_cancelled += 1
            self._close()

    def _close(self) -> None:
        self._is_open = False
        self._workers.num_open -= 1

    def _make(self, request: EngineRequest) -> Iterator[GenerateDelta]:
        """One delta a token, text withheld while a character is unfinished, as a worker does."""
        sampling = request.sampling
        prompts = self._workers.prompts
        if request.pooling is not None:
            yield GenerateDelta(
                index=0,
                token_ids=(),
                text="",
                logprobs=None,
                finish_reason="stop",
                num_prompt_tokens=len(request.prompt_token_ids),
                num_cached_tokens=0,
                worker_id=self._worker_id,
                version=request.version,
                embedding=np.arange(1, 9, dtype="<f4").tobytes(),
            )
            return
        token_ids = answer_token_ids(request, prompts)
        if sampling.max_tokens is not None:
            token_ids = token_ids[: sampling.max_tokens]
        pending = b""
        for i, token_id in enumerate(token_ids):
            pending += prompts.vocabulary.piece(token_id).utf8
            is_last = i == len(token_ids) - 1
            try:
                text, pending = pending.decode(), b""
            except UnicodeDecodeError:
                text = pending.decode(errors="replace") if is_last else ""
            yield GenerateDelta(
                index=0,
                token_ids=(token_id,),
                text=text,
                logprobs=(self._logprob(token_id, sampling.logprobs),) if sampling.logprobs is not None else None,
                finish_reason=("length" if i + 1 == sampling.max_tokens else "stop") if is_last else None,
                num_prompt_tokens=len(request.prompt_token_ids),
                num_cached_tokens=len(request.prompt_token_ids) // 2,
                prompt_logprobs=self._prompt_logprobs(request) if sampling.prompt_logprobs and i == 0 else None,
                stop_reason=token_id if is_last and i + 1 != sampling.max_tokens else None,
                worker_id=self._worker_id,
                version=request.version,
            )

    def _prompt_logprobs(self, request: EngineRequest) -> tuple[TokenLogprobs, ...]:
        first, *others = request.prompt_token_ids
        num_top = request.sampling.prompt_tops
        return (TokenLogprobs(first, None, ()), *(self._logprob(token_id, num_top) for token_id in others))

    @staticmethod
    def _logprob(token_id: int, num_top: int) -> TokenLogprobs:
        others = [(token_id + 1 + i) % VOCAB_SIZE for i in range(num_top)]
        top = tuple((other, -0.5 - i if i < 5 else float("-inf")) for i, other in enumerate(others))
        return TokenLogprobs(token_id, -token_id / 100, top)


@dataclass(slots=True)
class FakeStore:
    """An adapter store that can go away, come back, or fall silent."""

    versions: dict[str, str] = field(default_factory=lambda: dict(VERSIONS))
    chats: dict[str, AdapterChat] = field(default_factory=dict)
    vocabularies: dict[str, int] = field(default_factory=dict)
    """Of adapters that know more tokens than the base, or fewer."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    generation: int = 1
    raises: Exception | None = None
    """What a first use meets."""
    is_watched: bool = False
    is_silent: bool = False
    """Calls are taken and never answered."""
    num_resolved: int = 0
    changes: list[tuple[int, str]] = field(default_factory=list)
    """Generations and the names that changed then."""

    async def resolve(self, name: str) -> NamedVersion:
        self.num_resolved += 1
        await self._answer()
        if self.raises is not None:
            raise self.raises
        if name not in self.versions:
            raise UnknownAdapter("adapter_not_found", f"there is no adapter {name!r}")
        return self._entry(name)

    async def known(self, names: tuple[str, ...]) -> tuple[NamedVersion | None, ...]:
        self.num_resolved += 1
        await self._answer()
        return tuple(self._entry(name) if name in self.versions else None for name in names)

    async def names(self, since: int) -> NamesAt:
        await self._answer()
        if since >= 1:
            changed = {name for generation, name in self.changes if generation > since}
            entries = tuple(self._entry(name) for name in sorted(changed & self.versions.keys()))
            deleted = tuple(sorted(changed - self.versions.keys()))
            return NamesAt(self.generation, entries, deleted, is_whole=False)
        return NamesAt(self.generation, tuple(self._entry(name) for name in sorted(self.versions)))

    async def watch(self, generation: int) -> int:
        self.is_watched = True
        self.changed.clear()
        while generation == self.generation and not self.gone.is_set():
            await self.changed.wait()
            self.changed.clear()
        if self.gone.is_set():
            raise StoreUnavailable("away")
        return self.generation

    def flip(self, name: str, version: str | None) -> None:
        """Let a name point elsewhere, or nowhere."""
        if version is None:
            del self.versions[name]
        else:
            self.versions[name] = version
        self.generation += 1
        self.changes.append((self.generation, name))
        self.changed.set()

    def _entry(self, name: str) -> NamedVersion:
        chat, vocabulary = self.chats.get(name), self.vocabularies.get(name)
        return NamedVersion(name, self.versions[name], f"demo/{name}", chat=chat, vocabulary=vocabulary)

    async def _answer(self) -> None:
        if self.is_silent:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.gone.is_set():
            raise StoreUnavailable("away")

    def leave(self) -> None:
        """Die: calls that wait fail, and so do later ones."""
        self.gone.set()
        self.changed.set()

    def come_back(self) -> None:
        """Be there again."""
        self.gone.clear()
