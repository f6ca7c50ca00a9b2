"""Entries of a group's ring: each step, and each change of the memories, in the one order in which they take effect.

A step is numbers only: its header as integers and its packed array as it is. Nothing of sampling travels, for the first
rank alone chooses tokens. Changes are rare, and pickled.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass

import numpy as np

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.kernels.segments import SegmentShape
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.step.message import StepHeader, StepMessage
from lorafleet.workers.step.passes import PassShape
from lorafleet.workers.step.sampling import NO_SAMPLING


@dataclass(frozen=True, slots=True)
class Allocated:
    """An adapter version has this slot, and pages."""

    manifest: AdapterManifest
    slot: int
    number: int
    """Which allocation it is, for slots are given again."""


@dataclass(frozen=True, slots=True)
class Published:
    """The slot's adapter is live from the next step on."""

    slot: int


@dataclass(frozen=True, slots=True)
class Freed:
    """The slot and its pages are nobody's."""

    slot: int


@dataclass(frozen=True, slots=True)
class Zeroed:
    """These KV pages are to be zero."""

    pages: tuple[int, ...]


Change = Allocated | Published | Freed | Zeroed

_STEP, _CHANGE = 0, 1
_PREFIX = struct.Struct("<II")
"""The kind; of a step, how many integers its header has."""
_NUM_FORM, _NUM_SEGMENTS, _NUM_PASS = 6, 6, 9


def parts_of_step(message: StepMessage) -> tuple[bytes, memoryview]:
    """A step as the payload of a ring."""
    numbers = _numbers_of(message.header)
    return struct.pack(f"<II{len(numbers)}i", _STEP, len(numbers), *numbers), message.packed.data


def parts_of_change(change: Change) -> tuple[bytes, bytes]:
    """A change as the payload of a ring."""
    return _PREFIX.pack(_CHANGE, 0), pickle.dumps(change, protocol=pickle.HIGHEST_PROTOCOL)


def read_entry(payload: memoryview) -> StepMessage | Change:
    """Read what `parts_of_step` or `parts_of_change` made. A step's array is a view of the payload."""
    kind, num_numbers = _PREFIX.unpack_from(payload)
    if kind == _CHANGE:
        change: Change = pickle.loads(payload[_PREFIX.size :])
        return change
    numbers = struct.unpack_from(f"<{num_numbers}i", payload, _PREFIX.size)
    packed = np.frombuffer(payload, dtype=np.int32, offset=_PREFIX.size + 4 * num_numbers)
    return StepMessage(_header_of(numbers), packed, NO_SAMPLING)


def _numbers_of(header: StepHeader) -> list[int]:
    form = header.form
    numbers = [
        header.num_lines,
        header.num_decodes,
        header.num_table_pages,
        header.num_logits,
        header.num_prompt_rows,
        header.num_prompt_tops,
        header.num_sampled_rows,
        header.has_pending,
        header.has_extras,
        header.skips_experts,
        form is not None,
    ]
    if form is not None:
        numbers += (form.num_rows, form.num_decodes, form.num_pages, form.num_prompts)
        numbers += (form.has_extras, form.skips_experts)
    numbers += _of_segments(header.segments)
    for each in header.passes:
        numbers += (each.start, each.own_start, each.own_stop, *_of_segments(each.segments))
    return numbers


def _header_of(numbers: tuple[int, ...]) -> StepHeader:
    """The header without what the first rank alone needs: which sequence samples which row, and what is pooled."""
    *plain, num_sampled, has_pending, has_extras, skips_experts, has_form = numbers[:11]
    end, form = 11, None
    if has_form:
        num_rows, num_decodes, num_pages, num_prompts, *flags = numbers[end : end + _NUM_FORM]
        form = GraphForm(num_rows, num_decodes, num_pages, num_prompts, *map(bool, flags))
        end += _NUM_FORM
    segments = _segments_of(numbers[end : end + _NUM_SEGMENTS])
    end += _NUM_SEGMENTS
    passes = tuple(
        PassShape(start, own_start, own_stop, _segments_of(tuple(segments)))
        for start, own_start, own_stop, *segments in (
            numbers[first : first + _NUM_PASS] for first in range(end, len(numbers), _NUM_PASS)
        )
    )
    num_lines, num_line_decodes, num_table_pages, num_logits, num_prompt_rows, num_prompt_tops = plain
    return StepHeader(
        num_lines=num_lines,
        num_decodes=num_line_decodes,
        num_table_pages=num_table_pages,
        num_logits=num_logits,
        num_prompt_rows=num_prompt_rows,
        num_prompt_tops=num_prompt_tops,
        num_sampled=(num_sampled,),
        has_pending=bool(has_pending),
        form=form,
        segments=segments,
        passes=passes,
        has_extras=bool(has_extras),
        skips_experts=bool(skips_experts),
    )


def _of_segments(shape: SegmentShape) -> tuple[int, ...]:
    return (
        shape.num_rows,
        shape.max_chunks,
        shape.chunk_length,
        shape.num_chunks,
        shape.num_lora_chunks,
        shape.is_exact,
    )


def _segments_of(numbers: tuple[int, ...]) -> SegmentShape:
    num_rows, max_chunks, chunk_length, num_chunks, num_lora_chunks, is_exact = numbers
    return SegmentShape(num_rows, max_chunks, chunk_length, num_chunks, num_lora_chunks, bool(is_exact))
