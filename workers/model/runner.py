"""Computes steps, one message at a time, with the substituted base, its KV cache and its adapter pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorafleet.kernels.reference import EXACT_ROWS
from lorafleet.kernels.segments import Segments
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.state_store import StateStore
from lorafleet.workers.model.cuda_graphs import StepGraph
from lorafleet.workers.model.loader import BaseModel
from lorafleet.workers.model.logits import BodyOnce
from lorafleet.workers.model.lora_context import LoraContext
from lorafleet.workers.model.paged_attention import AttentionContext
from lorafleet.workers.model.recurrent_layers import RecurrentContext
from lorafleet.workers.model.sampler import Chosen, Sampler, with_logprobs
from lorafleet.workers.ranks import Ranks
from lorafleet.workers.step.batch import StepInputs
from lorafleet.workers.step.forms import GraphForm, forms_with_extras
from lorafleet.workers.step.message import StepHeader, StepMessage
from lorafleet.workers.step.passes import LogitsPass


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that the device may still be computing."""

    next_token_ids: torch.Tensor | None
    """(num_sampled_rows,) int64 on the device: what the following step takes for its placeholders."""
    sampled: Chosen | None
    """On the host once `wait` returns; one row for each row of the message that is to be sampled."""
    pooled: torch.Tensor | None
    """(len(header.pooled), width) float32, on the host likewise: sums of hidden states."""
    prompts: Chosen | None
    """The same for its rows that give logprobs of prompts."""
    is_done: torch.cuda.Event | None

    def wait(self) -> None:
        """Block until the host's copies are complete: the step's only synchronisation."""
        if self.is_done is not None:
            self.is_done.synchronize()


@dataclass(frozen=True, slots=True)
class Substituted:
    """State that a base's substituted layers share. The runner sets it for each step."""

    lora: LoraContext
    attention: AttentionContext
    recurrent: RecurrentContext
    body: BodyOnce
    """Computes what lies below the head."""
    layers: str
    """As `fused_layers.Parts.kind`."""


class ModelRunner:
    """Computes steps with a base model whose leaves know about adapters and whose attention knows about pages."""

    def __init__(
        self,
        base: BaseModel,
        cache: KVCache,
        pool: AdapterPool,
        states: StateStore,
        substituted: Substituted,
        *,
        max_pages: int,
        graph_forms: tuple[GraphForm, ...] = (),
        max_pass_rows: int = 512,
        ranks: Ranks | None = None,
    ) -> None:
        """`max_pages`: KV pages of the longest sequence. `graph_forms`, rising: of the steps to capture; none on a CPU.
        `max_pass_rows`: rows whose logits exist at once. `startup.start_runner` makes one that is ready to serve.
        """
        self.base = base
        self.cache = cache
        self.pool = pool
        self.states = states
        self.body = substituted.body
        self.layers = substituted.layers
        self._lora = substituted.lora
        self._attention = substituted.attention
        self._recurrent = substituted.recurrent
        self.ranks = ranks or Ranks()
        self._sampler = Sampler()
        self.graphs: dict[tuple[GraphForm, int], StepGraph] = {}
        """By `StepHeader.graph_key`."""
        self.startup_s: dict[str, float] = {}
        """Seconds of each part of the start."""
        self.max_pages = max_pages
        self.graph_forms = graph_forms if base.device.type == "cuda" else ()
        self.extra_forms = forms_with_extras(self.graph_forms) if pool.num_slots else ()
        """Captured, too, for batches with extras."""
        kinds = {shape.kind for shape in base.geometry.modules.values()}
        self.has_experts = pool.num_slots > 0 and "experts" in kinds
        """True if adapters may be on experts: batches of others have graphs of their own."""
        self.null_pages = cache.allocate(1) if self.graph_forms else []
        """Takes the keys and values of padding rows; never given back. None where nothing is padded."""
        self.pass_rows = 1 if base.device.type == "cuda" else EXACT_ROWS, max_pass_rows
        """Fewest and most rows of a pass over the head. On a CPU a row's bits do not depend on the passes."""

    @property
    def can_pool(self) -> bool:
        """True if hidden states can be had beside logits."""
        return self.body.may_keep and self.body.was_called

    @property
    def can_recompute(self) -> bool:
        """True if a pass over the head may compute the body anew, and does not yet. States would go on twice."""
        return self.body.may_keep and not self.states.has_states

    @property
    def is_asynchronous(self) -> bool:
        """True if `launch` returns before the step is computed."""
        return self.base.device.type == "cuda"

    @contextmanager
    def reading(self, cache: KVCache) -> Iterator[None]:
        """Within it, steps without a graph keep keys and values in another cache of the same shape of pages."""
        own = self.cache
        self.cache = self._attention.cache = cache
        try:
            yield
        finally:
            self.cache = self._attention.cache = own

    def compile_prompts(self, max_rows: int) -> None:
        """Compile what attends to prompts, for steps of up to `max_rows` rows. One of each kind must have run."""
        if self._attention.prompt_attention is not None:
            self._attention.prompt_attention.compile_others(max_rows, self.cache.keys[0].shape[0])

    @torch.inference_mode()
    def logits(self, message: StepMessage) -> list[torch.Tensor]:
        """(rows, vocab) logits of each pass of a step, computed at once and without a graph."""
        inputs = message.view(torch.from_numpy(message.packed).to(self.base.device))
        with self.step(inputs):
            return [self.logits_of(inputs, each) for each in inputs.passes]

    @torch.inference_mode()
    def launch(
        self, message: StepMessage, previous: StepInFlight | None, fill_masks: Callable[[], None] = lambda: None
    ) -> StepInFlight:
        """Begin one step. Placeholder tokens of the message are taken from `previous`, which may be in flight.

        fill_masks: fills in the masks of `message.sampling`. It is called behind the launch of the forward pass, which
        needs none, so it may wait for `previous` while the device goes on.
        """
        header = message.header
        packed = torch.from_numpy(message.packed)
        pooled: torch.Tensor | None = None
        if header.form is None:
            inputs = message.view(self._own(packed))
            self._fill_pending(inputs, header, previous)
            with self.step(inputs):
                parts = []
                for number, (shape, each) in enumerate(zip(header.passes, inputs.passes, strict=True)):
                    logits = self.logits_of(inputs, each)
                    if number == 0:
                        fill_masks()
                    parts.append(self._choose(logits, message, shape.first_own, inputs.targets))
                if header.pooled:
                    hidden = self.body.hidden_states
                    sums = [hidden[first:end].sum(dim=0, dtype=torch.float32) for first, end in header.pooled]
                    pooled = torch.stack(sums)
        else:
            graph = self.graphs[header.graph_key]
            graph.packed.copy_(self._pinned(packed), non_blocking=True)
            self._fill_pending(graph.inputs, header, previous)
            logits = graph.replay()
            fill_masks()
            parts = [self._choose(logits, message, 0, graph.inputs.targets)]
        prompts = Chosen.joined([part for part, _ in parts if part is not None])
        sampled = Chosen.joined([part for _, part in parts if part is not None])
        step = StepInFlight(
            next_token_ids=None if sampled is None else sampled.token_ids,
            sampled=None if sampled is None else sampled.to_host(),
            pooled=None if pooled is None else pooled.to("cpu", non_blocking=True),
            prompts=None if prompts is None else prompts.to_host(),
            is_done=torch.cuda.Event() if self.base.device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        )
        if step.is_done is not None:
            step.is_done.record()
        return step

    def _choose(
        self, logits: torch.Tensor, message: StepMessage, first: int, targets: torch.Tensor
    ) -> tuple[Chosen | None, Chosen | None]:
        """Choose from the logits of a pass, for prompts and for rows to sample.

        logits: (rows, vocab), of the step's logits rows from `first` on; padding may follow the last. targets: as in
        `StepInputs`.
        """
        header = message.header
        num_prompt_rows = header.num_prompt_rows
        last = min(first + len(logits), num_prompt_rows + header.num_sampled_rows)
        middle = min(max(first, num_prompt_rows), last)
        prompts = sampled = None
        if first < middle:
            prompts = with_logprobs(logits[: middle - first], targets[first:middle].long(), header.num_prompt_tops)
        if middle < last:
            sampling = message.sampling.part(middle - num_prompt_rows, last - num_prompt_rows)
            sampled = self._sampler.sample(logits[middle - first : last - first], sampling)
        return prompts, sampled

    def _own(self, packed: torch.Tensor) -> torch.Tensor:
        """A copy where the model is, which may be written to: the message stays as it came."""
        if self.base.device.type == "cpu":
            return packed.clone()
        return self._pinned(packed).to(self.base.device, non_blocking=True)

    def _pinned(self, packed: torch.Tensor) -> torch.Tensor:
        """The host tensor as one from which a copy to the device need not wait."""
        return packed.pin_memory() if self.base.device.type == "cuda" else packed

    def _fill_pending(self, inputs: StepInputs, header: StepHeader, previous: StepInFlight | None) -> None:
        """Put the tokens that the step in flight chooses in the places of their placeholders."""
        if header.has_pending:
            assert previous is not None
            assert previous.next_token_ids is not None
            token_ids = inputs.token_ids
            chosen = previous.next_token_ids[(-1 - token_ids).clamp_(min=0)]
            torch.where(token_ids < 0, chosen.to(token_ids.dtype), token_ids, out=token_ids)

    @contextmanager
    def step(self, inputs: StepInputs) -> Iterator[None]:
        """All layers read these inputs, and what lies below the head is computed once."""
        self._attention.begin(inputs.attention)
        self._recurrent.begin(inputs)
        self._lora.segments = _if_lora(inputs.segments)
        self._lora.has_extras = inputs.has_extras
        self._lora.skips_experts = inputs.skips_experts
        try:
            with self.body.once():
                yield
        finally:
            self._attention.end()
            self._recurrent.pieces = None
            self._lora.segments = self._lora.logits_segments = None

    def logits_of(self, inputs: StepInputs, logits_pass: LogitsPass) -> torch.Tensor:
        """(rows, vocab) logits of a pass's own rows, within a step."""
        self._lora.logits_segments = _if_lora(logits_pass.segments)
        output = self.base.model(
            input_ids=inputs.token_ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            logits_to_keep=logits_pass.rows,
        )
        logits: torch.Tensor = output.logits[0]
        num_rows = logits_pass.rows.shape[0]
        if logits.shape[0] != num_rows:
            raise UnsupportedModel(
                f"{type(self.base.model).__name__} does not give the logits of the chosen rows: of {num_rows} rows "
                f"there are {logits.shape[0]}"
            )
        if inputs.has_extras:
            logits = self._lora.with_own_vocabularies(logits, self.base.vocab_size)
        return logits[logits_pass.own]

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """(rows, vocab) logits of a step of one pass."""
        (only,) = inputs.passes
        with self.step(inputs):
            return self.logits_of(inputs, only)


def _if_lora(segments: Segments) -> Segments | None:
    return segments if segments.has_lora else None
