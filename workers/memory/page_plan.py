"""Plans the place of each of an adapter's rows, in its pages and in `AdapterWeights.flat`.

The plan knows the adapter's pages as `0 .. num_pages - 1`; the pool maps them to the pages that it allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.kernels.weights import LOAD_ALIGN, aligned
from lorafleet.workers.memory.packing import Ints, pack_rows
from lorafleet.workers.memory.pool_layout import Piece, PoolLayout

BLOCK_BYTES = 16 << 20
"""Weights are copied in blocks of about this size, so that the one is on its way while the next is made ready. A step's
inputs may have to wait for one: 0.3 ms."""


MAX_GAP = 1 << 16
"""Elements that are copied and not used, in one run."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some neighbours of `PagePlan.order`: whole rows, within elements `first` to `last` of the adapter's array."""

    first_row: int
    last_row: int
    """The row after the block's."""
    first: int
    last: int
    """The element after the block's."""


@dataclass(frozen=True, slots=True, eq=False)
class PagePlan:
    """A packing of one adapter's rows."""

    num_pages: int
    page_elements: int
    pieces: tuple[Piece, ...]
    offsets: Ints
    """(num_rows,) first element of each row in the adapter's pages laid end to end; the rows of the pieces in order."""
    entries: Ints
    """(num_table_rows,) entry of each row in the slot's row tables, flattened; the rows after them are of extras."""
    order: Ints
    """(num_rows,) indices of the rows, in the order in which they lie in `AdapterWeights.flat`."""
    sources: Ints
    """(num_rows,) first element there of each row, in `order`."""
    widths: Ints
    """(num_rows,) elements of each row, in `order`."""
    is_aligned: bool
    """`sources` and `widths` are multiples of LOAD_ALIGN."""
    blocks: tuple[Block, ...]
    """Together all rows in `order`."""

    @property
    def num_elements(self) -> int:
        """Elements of the adapter that are here."""
        return int(self.widths.sum())

    def starts(self, page_ids: Ints) -> Ints:
        """(num_rows,) first element of each row when the plan's pages lie at `page_ids`."""
        pages, within = np.divmod(self.offsets, self.page_elements)
        return page_ids[pages] * self.page_elements + within

    def fill_moves(self, starts: Ints, moves: Ints) -> None:
        """Write what `place_rows` takes for the rows of each block into `moves`, (3, num_rows) in `order`.

        starts: where the rows are to lie. The rows are taken from their block's part of the adapter's array.
        """
        moves[0] = self.sources
        moves[1] = self.widths
        np.take(starts, self.order, out=moves[2])
        for block in self.blocks:
            moves[0, block.first_row : block.last_row] -= block.first

    def extra_starts(self, starts: Ints) -> dict[str, list[Ints]]:
        """Of each extra, by part: (num_rows,) those of `starts` that are its rows'."""
        found: dict[str, list[Ints]] = {}
        first = len(self.entries)
        for piece in self.pieces:
            if piece.kind == "extra":
                found.setdefault(piece.name, []).append(starts[first : first + piece.count])
                first += piece.count
        return found


def pack(manifest: AdapterManifest, layout: PoolLayout) -> PagePlan:
    """Plan the pages of an adapter: the same for the same arguments, wherever and whenever it runs."""
    pieces = layout.pieces(manifest)
    counts = np.array([piece.count for piece in pieces], dtype=np.int64)
    pitches = np.array([aligned(piece.width) for piece in pieces], dtype=np.int64)
    packing = pack_rows(pitches, counts, layout.page_elements)
    in_tables = [piece for piece in pieces if piece.kind != "extra"]
    assert in_tables == pieces[: len(in_tables)], "extras come last"
    num_table_rows = int(counts[: len(in_tables)].sum())
    first_entries = np.array([_first_entry(piece, layout) for piece in in_tables], dtype=np.int64)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    runs = np.repeat(np.array([piece.run or piece.count for piece in pieces], dtype=np.int64), counts)
    table, entry = np.divmod(within, runs)
    sources = np.repeat(np.array([piece.start for piece in pieces], dtype=np.int64), counts)
    sources += within * np.repeat(np.array([piece.stride for piece in pieces], dtype=np.int64), counts)
    order = np.argsort(sources, kind="stable")
    sources = sources[order]
    widths = np.repeat(np.array([piece.width for piece in pieces], dtype=np.int64), counts)[order]
    return PagePlan(
        num_pages=packing.num_pages,
        page_elements=layout.page_elements,
        pieces=tuple(pieces),
        offsets=packing.offsets,
        entries=np.repeat(first_entries, counts[: len(in_tables)]) + (table * layout.max_rank + entry)[:num_table_rows],
        order=order,
        sources=sources,
        widths=widths,
        is_aligned=not np.any(sources % LOAD_ALIGN) and not np.any(widths % LOAD_ALIGN),
        blocks=tuple(_blocks(sources, widths, elements_of_block(layout))),
    )


def elements_of_block(layout: PoolLayout) -> int:
    """Most elements of one block: a row, which is no wider than a page, fits at least."""
    return max(layout.page_elements, BLOCK_BYTES * layout.page_elements // layout.page_bytes)


def _blocks(sources: Ints, widths: Ints, max_elements: int) -> Iterator[Block]:
    ends = sources + widths
    gaps = sources[1:] - ends[:-1]
    assert np.all(gaps >= 0), "two rows of an adapter share elements"
    # What lies between two rows is of another rank. Short gaps are copied along, since a call costs more.
    breaks = np.flatnonzero(gaps > MAX_GAP) + 1
    first_row = 0
    while first_row < len(sources):
        first = int(sources[first_row])
        last_row = int(np.searchsorted(ends, first + max_elements, side="right"))
        next_break = int(np.searchsorted(breaks, first_row, side="right"))
        last_row = min([last_row, *breaks[next_break : next_break + 1].tolist()])
        assert last_row > first_row, (widths[first_row], max_elements)
        yield Block(first_row, last_row, first, int(ends[last_row - 1]))
        first_row = last_row


def _first_entry(piece: Piece, layout: PoolLayout) -> int:
    place = layout.places[piece.name]
    table = place.b_table + piece.part * place.shape.num_experts if piece.kind == "b" else place.a_table
    return table * layout.max_rank + piece.entry
