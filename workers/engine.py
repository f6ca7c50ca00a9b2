"""The step loop of one worker, on a thread of its own: schedule, compute, hand out tokens; all else between steps.

Scheduler, memory and adapters belong to this thread; others talk to it through `submit`, `abort` and `call`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lorafleet.workers import speculation
from lorafleet.workers.adapter_loader import AdapterLoader
from lorafleet.workers.commands import Commands
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.deltas import embedding_delta, token_delta
from lorafleet.workers.detokenizer import Detokenizer
from lorafleet.workers.errors import (
    EngineFailed,
    GrammarRefused,
    InvalidTokenId,
    NonFiniteOutput,
    PoolingUnsupported,
    PromptTooLong,
    WorkerError,
)
from lorafleet.workers.grammars import Grammars, Matcher
from lorafleet.workers.group.leader import Group
from lorafleet.workers.launched import LaunchedStep
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.request import EngineRequest, FinishReason, GenerateDelta, StructuredOutputs, TokenLogprobs
from lorafleet.workers.scheduler import Scheduler
from lorafleet.workers.sequence import ScheduledRows, Sequence
from lorafleet.workers.speculation import Guesser
from lorafleet.workers.stats import EngineStats, ServedCounts
from lorafleet.workers.step.builder import BatchBuilder, BuiltStep

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Delivery = tuple[str, GenerateDelta | Exception]
"""A request id and what came of it. After an error or a finish reason nothing more comes."""

COMPILERS = 8
"""Threads that compile grammars, which the ingress has compiled before: one that is slow keeps no other waiting."""
IDLE_WAIT_S = 0.2
"""How long an idle loop sleeps before it shows that it lives."""


class Engine:
    """Generates for many requests at once on one device.

    `deliver` is called on the engine's thread, once a step, with what the step made.
    """

    def __init__(
        self,
        runner: ModelRunner,
        loader: AdapterLoader,
        tokenizer: PreTrainedTokenizerBase | None,
        config: EngineConfig,
        deliver: Callable[[list[Delivery]], None],
        *,
        worker_id: str = "",
        group: Group | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """group: the other ranks, which compute every step too; None: there are none."""
        self.stats = EngineStats()
        self._runner = runner
        self._loader = loader
        self._tokenizer = tokenizer
        self._config = config
        # A guess that does not stand could not be taken out of a state.
        self._speculation = None if runner.states.has_states else config.speculation
        self._deliver = deliver
        self._worker_id = worker_id
        self._group = group
        self._clock = clock
        self._scheduler = Scheduler(
            runner.cache,
            loader,
            runner.states,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_wait_s=config.max_wait_s,
            clock=clock,
        )
        self._batches = BatchBuilder(
            page_tokens=runner.cache.page_tokens,
            max_pages=runner.max_pages,
            stop_token_ids=runner.base.stop_token_ids,
            vocab_size=runner.base.vocab_size,
            num_slots=runner.pool.num_slots,
            pass_rows=runner.pass_rows,
            graph_forms=runner.graph_forms,
            extra_forms=runner.extra_forms,
            has_experts=runner.has_experts,
            null_page=next(iter(runner.null_pages), 0),
            has_states=runner.states.has_states,
        )
        self._grammars = Grammars(
            tokenizer, vocab_size=runner.base.vocab_size, stop_token_ids=runner.base.stop_token_ids
        )
        self._compilers = ThreadPoolExecutor(max_workers=COMPILERS, thread_name_prefix="grammars")
        self._compiling: set[str] = set()
        """Requests whose grammar is being compiled, which nobody has aborted."""
        self._sequences: dict[str, Sequence] = {}
        self._outbox: list[Delivery] = []
        self._in_flight: LaunchedStep | None = None
        self._commands = Commands()
        self._loop_alive_s = clock()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lorafleet-engine", daemon=True)
        loader.on_progress = self._commands.wake.set
        if group is not None:
            group.on_failure = self._commands.wake.set

    # --- from any thread ---

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """End the loop; requests in flight get EngineFailed."""
        self._commands.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; everything that comes of it is delivered under its id."""
        if request.sampling.structured_outputs is None:
            self._commands.post(lambda: self._add(request))
        else:
            self._commands.post(lambda: self._compile(request, request.sampling.structured_outputs))

    def abort(self, request_id: str) -> None:
        """End a request that nobody waits for; unknown and finished ids are fine. Takes effect before the next step."""
        with contextlib.suppress(EngineFailed):  # then there is nothing to end
            self._commands.post(lambda: self._abort(request_id))

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run `function` on the engine's thread between two steps."""
        return self._commands.call(function)

    def served(self) -> ServedCounts:
        """Return the counts of served work. On the engine's thread."""
        self.stats.served.num_preemptions = self._scheduler.num_preemptions
        return self.stats.served.copy()

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def check_health(self) -> None:
        """Raises EngineFailed when the step loop has ended or stands still."""
        if self._failure is not None:
            raise EngineFailed(f"the step loop ended: {type(self._failure).__name__}: {self._failure}")
        if not self._thread.is_alive():
            raise EngineFailed("the step loop has ended")
        if self.is_stalled:
            raise EngineFailed(
                f"the step loop has stood still for {self._still_s:.0f} s, more than {self._config.stall_s:g}"
            )

    @property
    def is_stalled(self) -> bool:
        """True if the step loop lives and has stood still for longer than `stall_s`."""
        return self._thread.is_alive() and self._still_s > self._config.stall_s

    @property
    def _still_s(self) -> float:
        """Seconds since the step loop last went round."""
        return self._clock() - self._loop_alive_s

    # --- on the engine's thread ---

    def _run(self) -> None:
        try:
            if self._runner.base.device.type == "cuda":
                torch.cuda.set_device(self._runner.base.device)  # a thread starts on the first GPU
            while not self._commands.is_closed:
                self._loop_alive_s = self._clock()
                self._commands.wake.clear()
                if self._group is not None:
                    self._group.check()
                self._commands.run()
                self._loader.publish_ready()
                self._fail_unloadable()
                if not self._step():
                    self._flush()
                    self._commands.wake.wait(IDLE_WAIT_S)
        except BaseException as error:
            logger.exception("the step loop ended")
            self._failure = error
        finally:
            self._commands.close()
            self._commands.run()
            for sequence in list(self._sequences.values()):
                self._end_with(sequence, EngineFailed("the worker's step loop ended"))
            for request_id in self._compiling:
                self._outbox.append((request_id, EngineFailed("the worker's step loop ended")))
            self._flush()
            self._compilers.shutdown(wait=False, cancel_futures=True)
            self._loader.close()

    def _step(self) -> bool:
        """Launch the next step, then collect the one before it: on a GPU the host works while the device does.

        Where guesses pay, collect first: they continue from tokens that the host knows.
        """
        before = self._in_flight
        if before is not None and (before.has_guesses or self._guesses_pay):
            self._collect(before)
            before = self._in_flight = None
        launched = self._launch(self._scheduler.schedule(self._guesses()))
        if self._runner.is_asynchronous:
            self._in_flight = launched
        elif launched is not None:
            self._collect(launched)
        if before is not None:
            self._collect(before)
        return launched is not None or before is not None

    def _launch(self, scheduled: list[ScheduledRows]) -> LaunchedStep | None:
        if not scheduled:
            return None
        started_s = self._clock()
        built = self._batches.build(scheduled)
        previous = None if self._in_flight is None else self._in_flight.step
        if self._group is not None:
            self._group.tell_step(built.message, None if previous is None else previous.next_token_ids)
        step = self._runner.launch(built.message, previous, partial(self._fill_masks, built))
        return LaunchedStep.of(step, built.rows, built.prompts, started_s)

    def _fill_masks(self, built: BuiltStep) -> None:
        """Ask the grammars which tokens may come, once they have those of the step in flight.

        The forward pass of `built` stands behind that step on the device, which so has work meanwhile.
        """
        if not built.message.sampling.masked.size:
            return
        if self._in_flight is not None:
            self._in_flight.follow()
        built.fill_masks()

    @property
    def _guesses_pay(self) -> bool:
        """True if the next step should compute guessed tokens, too."""
        asked = self._speculation
        if asked is None or self._scheduler.num_running > speculation.MAX_ROWS:
            return False
        return speculation.pays([sequence.guesser for sequence in self._scheduler.decoding], asked.tokens)

    def _guesses(self) -> dict[Sequence, list[int]]:
        """Return the tokens to guess behind those that the host knows; none where it does not know the last."""
        asked = self._speculation
        if asked is None or self._in_flight is not None or not self._guesses_pay:
            return {}
        return {
            sequence: sequence.guesser.guess(min(asked.tokens, sequence.max_tokens - sequence.num_made - 1))
            for sequence in self._scheduler.decoding
            if sequence.guesser is not None
        }

    def _collect(self, launched: LaunchedStep) -> None:
        launched.follow()
        chosen = launched.step.sampled
        token_ids = [] if chosen is None else chosen.token_ids.tolist()
        standing = launched.settle(token_ids, self.stats.served)
        for row in launched.rows:
            row.share_pages(self._runner.cache)
        launched.note_prompt_logprobs()
        if chosen is not None:
            is_finite = chosen.peaks.isfinite().tolist()
            logprobs = None if chosen.logprobs is None else chosen.logprobs.tolist()
            for index in standing:
                sequence, place = launched.sampled[index].sequence, launched.sampled[index].place
                if sequence.is_over:  # it ended after this step was launched
                    continue
                if not is_finite[index]:
                    self._end_unusable(sequence)
                    continue
                if sequence.matcher is not None and sequence.matcher.error is not None:
                    self._end_with(sequence, GrammarRefused(sequence.matcher.error))
                    continue
                token_logprobs = None
                num_top = sequence.request.sampling.logprobs
                if num_top is not None:
                    assert logprobs is not None
                    token_logprobs = (TokenLogprobs(token_ids[index], logprobs[index], chosen.top(index, num_top)),)
                self._deliver_token(sequence, place, token_logprobs)
        for sequence in launched.embedded():
            self._deliver_embedding(sequence)
        self.stats.note_step(len(launched.rows), launched.num_rows, self._clock() - launched.started_s)
        self._flush()

    def _deliver_embedding(self, sequence: Sequence) -> None:
        assert sequence.pooled is not None
        vector = sequence.pooled / (sequence.num_prompt if sequence.request.pooling == "mean" else 1)
        if not np.isfinite(vector).all():
            self._end_unusable(sequence)
            return
        self._outbox.append((sequence.request.request_id, embedding_delta(sequence, vector, self._worker_id)))
        self.stats.served.note_prompt(sequence.num_prompt, sequence.num_cached)
        self._finish(sequence, "stop", 0)

    def _deliver_token(self, sequence: Sequence, place: int, logprobs: tuple[TokenLogprobs, ...] | None) -> None:
        if sequence.guesser is not None:
            sequence.guesser.take(sequence.token_ids[place])
        num_made = place + 1 - sequence.num_prompt
        waits_s: tuple[float, float] | None = None
        if num_made == 1:
            sequence.first_token_s = self._clock() - sequence.arrival_s
            assert sequence.queue_s is not None
            waits_s = (sequence.queue_s, sequence.first_token_s - sequence.queue_s)
            self.stats.served.note_first_token(
                sequence.first_token_s, sequence.queue_s, sequence.num_prompt, sequence.num_cached
            )
        self.stats.served.num_generated_tokens += 1
        delta = token_delta(
            sequence,
            place,
            logprobs,
            base_end_ids=self._runner.base.stop_token_ids,
            waits_s=waits_s,
            worker_id=self._worker_id,
        )
        self._outbox.append((sequence.request.request_id, delta))
        if delta.finish_reason is not None:
            self._finish(sequence, delta.finish_reason, num_made)

    def _compile(self, request: EngineRequest, asked: StructuredOutputs | None) -> None:
        """Have the grammar compiled on another thread, and add the request when that is done."""
        assert asked is not None
        self._compiling.add(request.request_id)

        def done(compiled: Future[Matcher]) -> None:
            with contextlib.suppress(EngineFailed):  # which the loop's end has told the request
                self._commands.post(lambda: self._add_compiled(request, compiled))

        self._compilers.submit(self._grammars.matcher, asked).add_done_callback(done)

    def _add_compiled(self, request: EngineRequest, compiled: Future[Matcher]) -> None:
        if request.request_id not in self._compiling:
            return
        self._compiling.remove(request.request_id)
        error = compiled.exception()
        if error is None:
            self._add(request, compiled.result())
        else:
            assert isinstance(error, Exception)
            self._outbox.append((request.request_id, error))

    def _add(self, request: EngineRequest, matcher: Matcher | None = None) -> None:
        if matcher is not None:
            matcher.end_token_ids = frozenset(request.end_token_ids).difference(self._runner.base.stop_token_ids)
        refusal = self._refusal(request)
        if refusal is not None:
            self._outbox.append((request.request_id, refusal))
            return
        assert request.request_id not in self._sequences, f"request id {request.request_id} is in use"
        sampling = request.sampling
        room = self._runner.base.max_model_len - len(request.prompt_token_ids)
        sequence = Sequence(
            request=request,
            arrival_s=self._clock(),
            max_tokens=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            detokenizer=Detokenizer(
                self._tokenizer,
                sampling.stop,
                request.prompt_token_ids,
                keeps_special=not sampling.skip_special_tokens,
                keeps_stop=sampling.include_stop_str_in_output,
            ),
            token_ids=list(request.prompt_token_ids),
            matcher=matcher,
            guesser=self._guesser(request),
        )
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)
        if request.version is not None:
            self._loader.want(request.version)

    def _refusal(self, request: EngineRequest) -> WorkerError | None:
        """Return why this base cannot answer the request; None if it can."""
        base, num_prompt = self._runner.base, len(request.prompt_token_ids)
        if not 0 < num_prompt < base.max_model_len:
            return PromptTooLong(
                f"the prompt has {num_prompt} tokens; it must have at least 1 and leave room for an answer "
                f"within the model's {base.max_model_len}"
            )
        vocab_size = request.vocabulary or base.vocab_size
        for token_id in (*request.prompt_token_ids, *request.sampling.stop_token_ids, *request.sampling.logit_bias):
            if not 0 <= token_id < vocab_size:
                return InvalidTokenId(f"token id {token_id} is not in the vocabulary of {vocab_size}")
        if request.pooling is not None and not self._runner.can_pool:
            return PoolingUnsupported("the base keeps its hidden states to itself")
        return None

    def _guesser(self, request: EngineRequest) -> Guesser | None:
        """A guesser for an answer in which each row's choice depends on its own prefix alone."""
        depends = request.sampling.has_penalties or request.sampling.structured_outputs is not None
        if self._speculation is None or request.pooling is not None or depends:
            return None
        return Guesser(request.prompt_token_ids)

    def _abort(self, request_id: str) -> None:
        self._compiling.discard(request_id)
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence, "abort", sequence.num_made)

    def _finish(self, sequence: Sequence, reason: FinishReason, num_made: int) -> None:
        sequence.is_over = True
        del self._sequences[sequence.request.request_id]
        self._scheduler.finish(sequence)
        self._batches.release(sequence)
        self.stats.served.note_end(reason, self._clock() - sequence.arrival_s, sequence.first_token_s, num_made)

    def _end_with(self, sequence: Sequence, error: Exception) -> None:
        self._outbox.append((sequence.request.request_id, error))
        self._finish(sequence, "abort", sequence.num_made)

    def _end_unusable(self, sequence: Sequence) -> None:
        """Its numbers overflowed, which no other sequence notices."""
        self._runner.cache.scrub(sequence.kv_pages)
        error = NonFiniteOutput(
            f"the logits are not finite: the base and this adapter overflow {self._runner.base.dtype} on this prompt"
        )
        self._end_with(sequence, error)

    def _fail_unloadable(self) -> None:
        """End the requests whose adapter turned out not to be loadable."""
        for version, error in self._loader.take_failures().items():
            for sequence in list(self._sequences.values()):
                if sequence.version == version and not sequence.is_admitted:
                    self._end_with(sequence, error)
            self._loader.forget(version)

    def _flush(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._deliver(outbox)
