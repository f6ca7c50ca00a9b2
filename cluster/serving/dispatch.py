"""Turns a request into work for workers: resolves its adapter, tokenises it, splits `n`, streams and retries.

HTTP and the Python handle both come through here. Knows workers only as streams of deltas, so it runs without Ray.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from msgspec import structs

from lorafleet.cluster.errors import BadRequest, NoWorker, StoreUnavailable, StreamBroken, WorkerGone
from lorafleet.cluster.metrics import RequestMetrics, RequestTimer
from lorafleet.cluster.serving.names import Names
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.cluster.serving.vocabulary import Vocabulary
from lorafleet.cluster.wire import NamedVersion
from lorafleet.workers.request import EngineRequest, GenerateDelta, GenerateRequest, SamplingParams

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
RETRY_PAUSE_S = 0.05
"""Before another try: long enough for a client's own cancellation to arrive, and for the router to drop the dead."""

_SAMPLING_FIELDS = tuple(SamplingParams.model_fields)


Sink = Callable[[GenerateDelta], bool]
"""Takes a delta without a task that wakes for it; False where it does not take it. What it raises ends the answer."""


class WorkerStream(Protocol):
    """The deltas of one sequence as they come, without an index of their own."""

    async def next(self) -> GenerateDelta:
        """The next delta. Raises WorkerGone, Overloaded, NoWorker or a WorkerError."""
        ...

    def cancel(self) -> None:
        """Stop the work, also when no worker has taken it yet. Calling it again does nothing."""
        ...

    def pour_into(self, sink: Sink) -> None:
        """Give deltas in the middle of the answer to `sink` while a reader waits in `next`."""
        ...

    @property
    def worker_id(self) -> str | None:
        """The worker that took it; None until that is known."""
        ...


class Workers(Protocol):
    """All workers, behind a router."""

    def generate(
        self, request: EngineRequest, excluded: frozenset[str], *, only_resident: bool = False
    ) -> WorkerStream:
        """Start a sequence on some worker, not on one of `excluded`, which just failed it, while there are others.

        only_resident: where its adapter is, if it is anywhere, for no worker can fetch it now.
        """
        ...


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that was checked: what will run, before it runs."""

    request: GenerateRequest
    prompt_token_ids: tuple[int, ...]
    version: str | None
    vocabulary: Vocabulary
    sequences: tuple[EngineRequest, ...]
    """One for each of the `n` answers."""
    timer: RequestTimer
    """Measures from the request's arrival."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """One of the answers to what a client sent."""

    index: int
    sequence: EngineRequest
    timer: RequestTimer
    is_whole: bool


class Dispatcher:
    """Serves requests for one base and all its adapters."""

    def __init__(
        self,
        base_id: str,
        prompts: Prompts,
        names: Names,
        workers: Workers,
        metrics: RequestMetrics,
        *,
        salts_prefixes: bool = False,
    ) -> None:
        """salts_prefixes: callers share no KV of prompts with each other."""
        self.base_id = base_id
        self.prompts = prompts
        self.names = names
        self._workers = workers
        self._metrics = metrics
        self._salts_prefixes = salts_prefixes

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        """All deltas of all `n` answers as they come. Closing the iterator stops the workers."""
        prepared = await self.prepare(request, caller="")
        async with aclosing(self.stream([prepared])) as deltas:
            async for delta in deltas:
                yield delta

    async def prepare(
        self,
        request: GenerateRequest,
        *,
        caller: str,
        default_max_tokens: int | None = None,
        param: str | None = None,
    ) -> PreparedRequest:
        """Resolve and check a request. Raises a ClusterError, or what the store raises on a first use.

        caller: identifies the client. It is empty for Python handles, and where no key is needed.
        param: the client's name for its prompt.
        default_max_tokens: bound of the answer of a request without one. It need not fit the model's length.
        """
        model = self.model_of(request)
        timer = self._metrics.begin(self.adapter_name(model))
        try:
            adapter = await self.resolve(model)
            timer.end_stage("resolve")
            chat = None if adapter is None else adapter.chat
            vocabulary = await self.vocabulary_of(adapter)
            prompt_token_ids = await self.prompts.tokenize(request, chat, vocabulary, param)
            request = self._with_thought(request, prompt_token_ids, vocabulary)
            await self.prompts.check_grammar(request.structured_outputs)
            timer.end_stage("tokenize")
        except Exception as error:
            self._metrics.reject(timer, _code_of(error))
            raise
        sampling = SamplingParams.model_construct(**{name: getattr(request, name) for name in _SAMPLING_FIELDS})
        if sampling.max_tokens is None and default_max_tokens is not None:
            sampling = sampling.model_copy(update={"max_tokens": max(default_max_tokens, sampling.min_tokens)})
        version = None if adapter is None else adapter.version
        ends = () if chat is None else tuple(each for each in chat.end_token_ids if each < vocabulary.num_tokens)
        request_id = uuid.uuid4().hex
        sequences = tuple(
            EngineRequest(
                request_id=f"{request_id}-{i}",
                version=version,
                prompt_token_ids=prompt_token_ids,
                sampling=sampling if i == 0 else _reseeded(sampling, i),
                end_token_ids=ends,
                vocabulary=None if adapter is None else adapter.vocabulary,
                pooling=request.pooling,
                cache_salt=caller if self._salts_prefixes else "",
            )
            for i in range(request.n)
        )
        return PreparedRequest(request, prompt_token_ids, version, vocabulary, sequences, timer)

    async def vocabulary_of(self, adapter: NamedVersion | None) -> Vocabulary:
        """The tokens that an adapter knows; those of the base for None."""
        if adapter is None:
            return self.prompts.vocabulary
        return await self.prompts.vocabulary_of(adapter.chat, adapter.vocabulary)

    async def resolve(self, model: str) -> NamedVersion | None:
        """The adapter version that `model` names, None for the base. Raises ModelNotFound, StoreUnavailable."""
        if model == self.base_id:
            return None
        return await self.names.resolve(self.adapter_name(model))

    def _with_thought(
        self, request: GenerateRequest, prompt_token_ids: Sequence[int], vocabulary: Vocabulary
    ) -> GenerateRequest:
        """Some chat templates end a prompt with the tag that begins a thought."""
        outputs = request.structured_outputs
        if outputs is None or outputs.thought != "may_come":
            return request
        if not self.prompts.begins_thought(prompt_token_ids, vocabulary):
            return request
        return request.model_copy(update={"structured_outputs": outputs.model_copy(update={"thought": "begun"})})

    def model_of(self, request: GenerateRequest) -> str:
        """Return the model or adapter that a request names. Raises BadRequest where `model` and `lora_path` differ."""
        path = request.lora_path
        if not path or self.adapter_name(request.model) == path:
            return request.model
        if request.model == self.base_id:
            return path
        raise BadRequest(
            f"lora_path names {path[:128]!r} and model another adapter, {request.model[:128]!r}; send one", "lora_path"
        )

    def adapter_name(self, model: str) -> str:
        """The adapter's name in `model`, which may come with its base in front."""
        return model.removeprefix(f"{self.base_id}:")

    async def stream(
        self, prepared: Sequence[PreparedRequest], *, is_whole: bool = False, sink: Sink | None = None
    ) -> AsyncGenerator[GenerateDelta, None]:
        """Yield the deltas of all answers of all requests, merged; `index` numbers all answers.

        sink: offered the deltas in the middle of a lone answer, which are then not yielded.

        is_whole: the client sees an answer only at its end. So all its deltas come then, and an answer whose worker is
        lost starts again on another. Raises Overloaded, NoWorker, StreamBroken, or a worker's own error. An error ends
        every answer.
        """
        pairs = ((sequence, request.timer) for request in prepared for sequence in request.sequences)
        answers = [_Answer(i, sequence, timer, is_whole) for i, (sequence, timer) in enumerate(pairs)]
        outcome = "disconnect"
        try:
            async with aclosing(self._merged(answers, sink)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is not None:
                        outcome = delta.finish_reason
                    yield delta
        except Exception as error:
            outcome = _code_of(error)
            raise
        finally:
            for request in prepared:
                request.timer.end(outcome)

    def _merged(self, answers: Sequence[_Answer], sink: Sink | None) -> AsyncGenerator[GenerateDelta, None]:
        return self._deltas(answers[0], sink) if len(answers) == 1 else self._interleaved(answers)

    async def _interleaved(self, answers: Sequence[_Answer]) -> AsyncGenerator[GenerateDelta, None]:
        """Deltas of several answers, in the order in which they come. An error of one ends all."""
        merged: asyncio.Queue[GenerateDelta | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(answer, merged)) for answer in answers]
        try:
            num_running = len(tasks)
            while num_running:
                item = await merged.get()
                if item is None:
                    num_running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, answer: _Answer, merged: asyncio.Queue[GenerateDelta | Exception | None]) -> None:
        try:
            async with aclosing(self._deltas(answer)) as deltas:
                async for delta in deltas:
                    merged.put_nowait(delta)
        except Exception as error:
            merged.put_nowait(error)
        else:
            merged.put_nowait(None)

    async def _deltas(self, answer: _Answer, sink: Sink | None = None) -> AsyncGenerator[GenerateDelta, None]:
        """Deltas of one answer; another worker is tried when one fails it before anybody has seen of it."""
        sequence, timer = answer.sequence, answer.timer

        def pour(delta: GenerateDelta) -> bool:
            is_taken = sink is not None and sink(delta)
            if is_taken:
                timer.note_tokens(len(delta.token_ids))
            return is_taken

        excluded: frozenset[str] = frozenset()
        failure: Exception | None = None
        for attempt in range(1, MAX_ATTEMPTS + 1):
            # A worker that is tried again may not have let go of the former try yet.
            request = replace(sequence, request_id=f"{sequence.request_id}.{attempt}")
            only_resident = self.names.is_away or isinstance(failure, StoreUnavailable)
            stream = self._workers.generate(request, excluded, only_resident=only_resident)
            unseen: list[GenerateDelta] = []
            is_seen = is_finished = False
            try:
                while not is_finished:
                    delta = await stream.next()
                    if timer.first_token_s is None:
                        timer.note_waits(delta.worker_id, delta.waits_s)
                    timer.note_tokens(len(delta.token_ids))
                    if delta.index != answer.index:
                        delta = structs.replace(delta, index=answer.index)
                    is_finished = delta.finish_reason is not None
                    if is_finished:
                        timer.note_prompt(delta.num_prompt_tokens, delta.num_cached_tokens)
                    unseen.append(delta)
                    if is_finished or not answer.is_whole:
                        if not is_seen and sink is not None and not answer.is_whole:
                            stream.pour_into(pour)
                        is_seen = True
                        for each in unseen:
                            yield each
                        unseen.clear()
                        if not answer.is_whole:
                            timer.note_first_byte()  # whoever asks for more has sent what came before
                return
            except Exception as error:
                if not getattr(error, "retryable_elsewhere", False):
                    raise
                if is_seen:
                    raise StreamBroken("the worker was lost in the middle of the answer") from error
                timer.forget_tokens(sum(len(delta.token_ids) for delta in unseen))
                failure = error
                if stream.worker_id is not None:
                    excluded |= {stream.worker_id}
            finally:
                if not is_finished:
                    stream.cancel()
            logger.warning("try %d of request %s failed: %s", attempt, sequence.request_id, failure)
            if attempt < MAX_ATTEMPTS:
                await asyncio.sleep(RETRY_PAUSE_S * attempt)
        assert failure is not None
        if isinstance(failure, WorkerGone):
            raise NoWorker("no worker could take the request; try again", None, 1.0) from failure
        raise failure


def _code_of(error: Exception) -> str:
    return str(getattr(error, "code", "internal_error"))


def _reseeded(sampling: SamplingParams, offset: int) -> SamplingParams:
    """The parameters of a further answer: the seed moves on by one each, within 64 bits."""
    if sampling.seed is None:
        return sampling
    seed = (sampling.seed + offset + 2**63) % 2**64 - 2**63
    return sampling.model_copy(update={"seed": seed})
