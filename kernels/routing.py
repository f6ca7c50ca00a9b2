"""Rows of a mixture, put in the order of their experts, and of their adapters within each: made on the device.

A row is given to several experts, so it becomes as many *routed* rows. Those of one expert are neighbours, which
grouped products want. Within it those of one adapter are neighbours, which csgmv wants. Nothing here waits for the
device, and all sizes follow from the arguments', so a captured graph may hold it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lorafleet.kernels.segments import BASE_SLOT, CHUNK_LENGTHS, Segments


@dataclass(frozen=True, slots=True)
class Routed:
    """Routed rows in order; routed row `i * top_k + j` is row `i` at its `j`-th expert."""

    order: Tensor
    """(routed,) int64: which routed row stands at each place."""
    rows: Tensor
    """(routed,) int64: of which row it is."""
    places: Tensor
    """(routed,) integers: the place of each routed row."""
    expert_ends: Tensor
    """(num_experts,) int32: the place after each expert's last. Rows without an expert come after all."""
    segments: Segments | None
    """Of the places, with slots `slot * slot_stride + expert`; None: there is no LoRA work."""


def route(experts: Tensor, num_experts: int, segments: Segments | None, slot_stride: int) -> Routed:
    """Order the routed rows of one forward pass.

    experts: (rows, top_k) int64, the experts of each row; `num_experts` and more mean none. segments: of the rows.
    """
    if experts.is_cuda:
        from lorafleet.kernels import routing_triton

        if experts.numel() <= routing_triton.MOST_ROWS:
            return route_few(experts, num_experts, segments, slot_stride)
        if segments is None:
            return Routed(*routing_triton.order_of_experts(experts, num_experts), None)
    flat, top_k = experts.reshape(-1).clamp(max=num_experts), experts.shape[1]
    if segments is None:
        ordered, order = torch.sort(flat, stable=True)
        return Routed(order, order // top_k, _places(order), _ends(ordered, num_experts), None)
    slots = segments.row_slots.to(torch.int64).repeat_interleave(top_k, output_size=flat.shape[0])
    # Base rows, whose slot is -1, come first within an expert.
    keys, order = torch.sort(flat * 2**32 + slots + 1, stable=True)
    ordered, slots = flat[order], slots[order]
    has_adapter = (slots != BASE_SLOT) & (ordered < num_experts)
    virtual = torch.where(has_adapter, slots * slot_stride + ordered, BASE_SLOT)
    made = _segments(virtual, keys, num_experts, segments)
    return Routed(order, order // top_k, _places(order), _ends(ordered, num_experts), made)


def route_few(experts: Tensor, num_experts: int, segments: Segments | None, slot_stride: int) -> Routed:
    """Compute `route` by the kernels for few rows."""
    from lorafleet.kernels import routing_triton

    row_slots = None if segments is None else segments.row_slots
    order, rows, places, ends, keys, slots = routing_triton.order(experts, num_experts, row_slots, slot_stride)
    if segments is None or keys is None or slots is None:
        return Routed(order, rows, places, ends, None)
    chunk_length, max_chunks = _sizes(keys.shape[0], num_experts, segments)
    permutation, chunk_indptr, chunk_slots = routing_triton.segments(keys, slots, chunk_length, max_chunks)
    made = Segments(
        row_slots=slots,
        permutation=permutation,
        chunk_indptr=chunk_indptr,
        chunk_slots=chunk_slots,
        chunk_length=chunk_length,
        num_chunks=max_chunks,
        num_lora_chunks=max_chunks,
        host_row_slots=np.empty(0, np.int32),
    )
    return Routed(order, rows, places, ends, made)


def spread(x: Tensor, experts: Tensor, routed: Routed) -> Tensor:
    """Copy each row to the places of its routed rows.

    x: (rows, width), unit stride along width. experts: (rows, top_k). Returns (routed, width).
    """
    if x.is_cuda:
        from lorafleet.kernels import routing_triton

        return routing_triton.spread(x, experts.shape[1], routed.places)
    return x[routed.rows]


def combine(
    y: Tensor,
    experts: Tensor,
    weights: Tensor,
    routed: Routed,
    num_experts: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Sum what the experts of each row gave, times their weights, in `dtype`: (rows, width).

    y: (routed, width) by place. experts, weights: (rows, top_k). What has no expert counts as zero. A GPU writes into
    `out`, contiguous, if it is given.
    """
    num_rows, top_k = experts.shape
    if y.is_cuda:
        from lorafleet.kernels import routing_triton

        if out is None:
            out = torch.empty((num_rows, y.shape[1]), dtype=dtype, device=y.device)
        if num_rows:
            routing_triton.combine(y, experts, weights, routed.places, num_experts, out)
        return out
    scaled = y * weights.reshape(-1)[routed.order, None]
    return scaled[routed.places].view(num_rows, top_k, -1).sum(dim=1).to(dtype)


def repeat(num_experts: int, segments: Segments, slot_stride: int) -> Segments:
    """Segments of the rows once for each expert, all of one after all of another; slots as in `Routed.segments`."""
    device, num_rows = segments.row_slots.device, segments.num_rows
    experts = torch.arange(num_experts, device=device).repeat_interleave(num_rows, output_size=num_experts * num_rows)
    slots = segments.row_slots.to(torch.int64).repeat(num_experts)
    keys, order = torch.sort(experts * 2**32 + slots + 1, stable=True)
    virtual = torch.where(slots != BASE_SLOT, slots * slot_stride + experts, BASE_SLOT)
    made = _segments(virtual[order], keys, num_experts, segments)
    row_slots = virtual.to(torch.int32)
    host = row_slots.numpy() if device.type == "cpu" else made.host_row_slots
    return replace(made, row_slots=row_slots, permutation=order.to(torch.int32), host_row_slots=host)


def _places(order: Tensor) -> Tensor:
    return torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0], device=order.device))


def _sizes(num_rows: int, num_experts: int, of_rows: Segments) -> tuple[int, int]:
    """Chunk length and most chunks of so many routed rows."""
    most_segments = min(num_rows, (num_experts + 1) * of_rows.max_chunks)
    chunk_length = next((length for length in CHUNK_LENGTHS if num_rows <= most_segments * length), CHUNK_LENGTHS[-1])
    return chunk_length, min(num_rows, most_segments + num_rows // chunk_length)


def _ends(ordered: Tensor, num_experts: int) -> Tensor:
    edges = torch.arange(num_experts, device=ordered.device)
    return torch.searchsorted(ordered, edges, right=True).to(torch.int32)


def _segments(slots: Tensor, keys: Tensor, num_experts: int, of_rows: Segments) -> Segments:
    """Segments of rows in their order: `slots` and `keys` are (routed,) int64, and rows with one key are neighbours."""
    num_rows, device = slots.shape[0], slots.device
    chunk_length, max_chunks = _sizes(num_rows, num_experts, of_rows)
    places = torch.arange(num_rows, device=device)
    is_first = torch.ones(num_rows, dtype=torch.bool, device=device)
    is_first[1:] = keys[1:] != keys[:-1]
    first = torch.where(is_first, places, 0).cummax(0).values
    is_start = (places - first) % chunk_length == 0
    # What starts no chunk writes to an entry after the last, which nobody reads.
    chunk = torch.where(is_start, is_start.cumsum(0) - 1, max_chunks + 1)
    chunk_indptr = torch.full((max_chunks + 2,), num_rows, dtype=torch.int32, device=device)
    chunk_indptr.index_copy_(0, chunk, places.to(torch.int32))
    chunk_slots = torch.full((max_chunks + 2,), BASE_SLOT, dtype=torch.int32, device=device)
    row_slots = slots.to(torch.int32)
    chunk_slots.index_copy_(0, chunk, row_slots)
    return Segments(
        row_slots=row_slots,
        permutation=places.to(torch.int32),
        chunk_indptr=chunk_indptr[: max_chunks + 1],
        chunk_slots=chunk_slots[:max_chunks],
        chunk_length=chunk_length,
        num_chunks=max_chunks,
        num_lora_chunks=max_chunks,
        host_row_slots=row_slots.numpy() if device.type == "cpu" else np.empty(0, np.int32),
    )
