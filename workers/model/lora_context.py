"""The adapters of a running forward pass, as substituted layers read them: whose each row is, and what it brings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafleet.kernels.segments import Segments
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.extra_rows import Extra

Place = Literal["body", "logits"]
"""Where a module stands: in the body, which computes all rows, or after it, where only the logits' rows come."""


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """An adapter of a forward pass that brings parameters of its own."""

    rows: Tensor
    """(n,) int64, its rows, on the device."""
    extras: Mapping[str, Extra]
    """By name, as in `AdapterWeights.extras`."""
    vocabulary: int | None
    """How many tokens the adapter knows; None: those of the base."""


@dataclass(slots=True)
class LoraContext:
    """The adapter of each row of the running forward pass. The runner sets it; every substituted layer reads it."""

    resident_extras: Mapping[int, Mapping[str, Extra]] = field(default_factory=dict)
    """`AdapterPool.extras`."""
    segments: Segments | None = None
    """Of the rows that go through the layers; None: no LoRA work (base-only batches)."""
    logits_segments: Segments | None = None
    """Of the rows whose logits are wanted."""
    has_extras: bool | None = None
    """Whether any adapter of the pass has more than low-rank factors; by default whether any resident one has."""
    skips_experts: bool = False
    """Whether no adapter of the pass is on experts."""
    resident_vocabularies: Mapping[int, int] = field(default_factory=dict)
    """`AdapterPool.vocabularies`."""
    _last_owners: tuple[Segments | None, tuple[Owner, ...]] = (None, ())

    def __post_init__(self) -> None:
        if self.has_extras is None:
            self.has_extras = bool(self.resident_extras)

    def segments_at(self, place: Place, name: str, num_rows: int) -> Segments | None:
        """The segments of the rows that module `name` is given. Raises UnsupportedModel when it is given others.

        Rows and segments that do not belong together would give requests the adapters of other requests.
        """
        segments = self.logits_segments if place == "logits" else self.segments
        if segments is not None and segments.num_rows != num_rows:
            raise UnsupportedModel(
                f"module {name} is given {num_rows} rows where a step has {segments.num_rows}: "
                "it cannot be told which request's adapter a row uses"
            )
        return segments

    def with_own_vocabularies(self, logits: Tensor, num_tokens: int) -> Tensor:
        """The logits of a pass, -inf where a row's adapter, or the base with `num_tokens`, knows no such token."""
        owners = [(owner.rows, owner.vocabulary) for owner in self.owners(self.logits_segments)]
        if all(vocabulary is None for _, vocabulary in owners):
            return logits
        known = torch.full((len(logits), 1), num_tokens, device=logits.device)
        for rows, vocabulary in owners:
            known.index_fill_(0, rows, num_tokens if vocabulary is None else vocabulary)
        return logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= known, -torch.inf)

    def owners(self, segments: Segments | None) -> tuple[Owner, ...]:
        """The adapters of a pass with these segments that bring parameters of their own; most passes have none.

        Found on the host, once for all layers of a pass.
        """
        if segments is None or not self.has_extras or not (self.resident_extras or self.resident_vocabularies):
            return ()
        known, owners = self._last_owners
        if known is not segments:
            owners = tuple(_owners(segments, self.resident_extras, self.resident_vocabularies))
            self._last_owners = (segments, owners)
        return owners


def place_of(model: PreTrainedModel, name: str) -> Place:
    """Return the part of the model that has the module `name`: its body or its logits."""
    if model.get_submodule(name) is model.get_output_embeddings():
        return "logits"
    body = next(name for name, module in model.named_modules() if module is model.base_model)
    return "body" if not body or name.startswith(f"{body}.") else "logits"


def _owners(
    segments: Segments, resident_extras: Mapping[int, Mapping[str, Extra]], vocabularies: Mapping[int, int]
) -> Iterator[Owner]:
    row_slots, device = segments.host_row_slots, segments.row_slots.device
    for slot in np.unique(row_slots).tolist():
        extras, vocabulary = resident_extras.get(slot), vocabularies.get(slot)
        if extras is not None or vocabulary is not None:
            rows = torch.from_numpy(np.flatnonzero(row_slots == slot))
            rows = rows if device.type == "cpu" else rows.pin_memory().to(device, non_blocking=True)
            yield Owner(rows, extras or {}, vocabulary)
