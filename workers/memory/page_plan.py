"""Where every row of one adapter lies in its pages: `pack` plans, `Block.write` fills the pages of a block.

The plan knows the adapter's pages as `0 .. num_pages - 1`; the pool maps them to the pages that it allocated.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights, Array
from lorafleet.workers.memory.packing import Ints, Packing, pack_rows
from lorafleet.workers.memory.pool_layout import Piece, PoolLayout, aligned, count_piece_pages

with warnings.catch_warnings():
    # Weights from an object store are read-only, and only read here; torch says so once a process, which is now.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), dtype=np.uint8))

BLOCK_BYTES = 8 << 20
"""Pages are laid out and copied in blocks of about this size, so that the one goes on while the other does."""
_RUNS_AT_ONCE = 8
"""Runs that are looked up before another thread may have the interpreter."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of one piece that are neighbours in the pages of a block."""

    piece: Piece
    first: int
    """Of the piece's rows."""
    count: int
    start: int
    """First element in the block."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some neighbouring pages of a plan."""

    first_page: int
    num_pages: int
    page_elements: int
    runs: tuple[_Run, ...]
    """In the order in which they lie."""

    def write(self, weights: AdapterWeights, target: Array) -> None:
        """Lay the block's rows into the first elements of `target`, which is flat, and zero what no row covers."""
        num_elements = self.num_pages * self.page_elements
        parts, end = [], 0
        for number, run in enumerate(self.runs, 1):
            if run.start > end:
                parts.append(np.zeros(run.start - end, dtype=target.dtype))
            parts.append(_padded(_rows(run.piece, weights)[run.first : run.first + run.count]))
            end = run.start + parts[-1].size
            if number % _RUNS_AT_ONCE == 0:
                time.sleep(0)
        parts.append(np.zeros(num_elements - end, dtype=target.dtype))
        # One call for all: numpy would let the interpreter go and want it back for every run, and each time the step
        # loop, which launches kernels meanwhile, might wait for it. Nor may the loop wait until all runs are found.
        bits = np.dtype(f"i{target.itemsize}")  # every torch joins these
        joined = torch.from_numpy(target[:num_elements].view(bits))
        torch.cat([torch.from_numpy(part.view(bits)) for part in parts], out=joined)


@dataclass(frozen=True, slots=True)
class PagePlan:
    """A packing of one adapter's rows."""

    num_pages: int
    page_elements: int
    pieces: tuple[Piece, ...]
    offsets: Ints
    """(num_rows,) first element of each row in the adapter's pages laid end to end; the rows of the pieces in order."""
    entries: Ints
    """(num_table_rows,) entry of each row in the slot's row tables, flattened; the rows after them are of extras."""
    blocks: tuple[Block, ...]

    def starts(self, page_ids: Ints) -> Ints:
        """(num_rows,) first element of each row when the plan's pages lie at `page_ids`."""
        pages, within = np.divmod(self.offsets, self.page_elements)
        return page_ids[pages] * self.page_elements + within

    def extra_starts(self, starts: Ints) -> dict[str, list[Ints]]:
        """Of each extra, by part: (num_rows,) those of `starts` that are its rows'."""
        found: dict[str, list[Ints]] = {}
        first = len(self.entries)
        for piece in self.pieces:
            if piece.kind == "extra":
                found.setdefault(piece.name, []).append(starts[first : first + piece.count])
                first += piece.count
        return found


def count_adapter_pages(manifest: AdapterManifest, layout: PoolLayout) -> int:
    """`pack(manifest, layout).num_pages`, without the plan."""
    return count_piece_pages(layout.pieces(manifest), layout.page_elements)


def pack(manifest: AdapterManifest, layout: PoolLayout) -> PagePlan:
    """Plan the pages of an adapter: the same for the same arguments, wherever and whenever it runs."""
    pieces = layout.pieces(manifest)
    widths = np.array([aligned(piece.width) for piece in pieces], dtype=np.int64)
    counts = np.array([piece.count for piece in pieces], dtype=np.int64)
    packing = pack_rows(widths, counts, layout.page_elements)
    in_tables = [piece for piece in pieces if piece.kind != "extra"]
    assert in_tables == pieces[: len(in_tables)], "extras come last"
    first_entries = np.array([_first_entry(piece, layout) for piece in in_tables], dtype=np.int64)
    counts = counts[: len(in_tables)]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return PagePlan(
        num_pages=packing.num_pages,
        page_elements=layout.page_elements,
        pieces=tuple(pieces),
        offsets=packing.offsets,
        entries=np.repeat(first_entries, counts) + within,
        blocks=tuple(_blocks(pieces, packing, layout)),
    )


def pages_of_block(layout: PoolLayout) -> int:
    """Most pages of one block."""
    return max(1, BLOCK_BYTES // layout.page_bytes)


def _blocks(pieces: list[Piece], packing: Packing, layout: PoolLayout) -> Iterator[Block]:
    block_pages, offsets = pages_of_block(layout), packing.offsets
    block_elements = block_pages * layout.page_elements
    counts = np.array([piece.count for piece in pieces], dtype=np.int64)
    row_pieces = np.repeat(np.arange(len(pieces)), counts)
    pitches = np.array([aligned(piece.width) for piece in pieces], dtype=np.int64)[row_pieces]
    row_blocks = offsets // block_elements
    is_first = np.ones(len(offsets), dtype=bool)
    is_first[1:] = (np.diff(offsets) != pitches[:-1]) | (np.diff(row_pieces) != 0) | (np.diff(row_blocks) != 0)
    firsts = np.flatnonzero(is_first)
    lengths = np.diff(np.r_[firsts, len(offsets)])
    within = firsts - (np.cumsum(counts) - counts)[row_pieces[firsts]]
    runs: list[list[_Run]] = [[] for _ in range(-(-packing.num_pages // block_pages))]
    columns = (row_blocks[firsts], row_pieces[firsts], within, lengths, offsets[firsts] % block_elements)
    for block, piece, first, count, start in zip(*(column.tolist() for column in columns), strict=True):
        runs[block].append(_Run(pieces[piece], first, count, start))
    for index, block_runs in enumerate(runs):
        first_page = index * block_pages
        num_pages = min(block_pages, packing.num_pages - first_page)
        block_runs.sort(key=lambda run: run.start)
        yield Block(first_page, num_pages, layout.page_elements, tuple(block_runs))


def _first_entry(piece: Piece, layout: PoolLayout) -> int:
    place = layout.places[piece.name]
    table = place.b_table + piece.part if piece.kind == "b" else place.a_table
    return table * layout.max_rank + piece.entry


def _rows(piece: Piece, weights: AdapterWeights) -> Array:
    """(count, width) view of the piece's rows."""
    if piece.kind == "extra":
        array = weights.extras[piece.name]
    else:
        a, b = weights.tensors[piece.name]
        array = a if piece.kind == "a" else b
    rows = array.reshape(-1)[piece.start :]
    if piece.stride == piece.width:
        return rows[: piece.count * piece.width].reshape(piece.count, piece.width)
    strides = (piece.stride * rows.itemsize, rows.itemsize)
    return np.lib.stride_tricks.as_strided(rows, (piece.count, piece.width), strides, writeable=False)


def _padded(rows: Array) -> Array:
    """(count * pitch,) the rows one after another, each followed by zeros up to its pitch."""
    padding = aligned(rows.shape[1]) - rows.shape[1]
    return (np.pad(rows, ((0, 0), (0, padding))) if padding else rows).reshape(-1)
