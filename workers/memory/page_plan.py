"""Where every row of one adapter lies in its pages: `pack` plans, `PagePlan.write` fills the pages.

The plan knows the adapter's pages as `0 .. num_pages - 1`; the pool maps them to the pages that it allocated.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights, Array
from lorafleet.workers.memory.packing import Ints, pack_rows
from lorafleet.workers.memory.pool_layout import Piece, PoolLayout, aligned, count_piece_pages

NUM_SHARES = 4
"""Parts that the copying of one adapter is cut into when threads share it."""


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
    page_ends: Ints
    """(num_pages,) elements of each page in use; they are its first."""

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

    def write(self, weights: AdapterWeights, target: Array, page_ids: Ints, threads: Executor | None = None) -> None:
        """Copy the weights into pages `page_ids` of `target`, which is flat, and zero what no row covers in them.

        Rows that are neighbours in both places are one copy. `threads` share the copying.
        """
        pages = target.reshape(-1, self.page_elements)
        for end in np.unique(self.page_ends[self.page_ends < self.page_elements]).tolist():
            pages[page_ids[self.page_ends == end], end:] = 0
        starts = self.starts(page_ids)
        counts = np.array([piece.count for piece in self.pieces])
        first_rows = np.cumsum(counts) - counts
        if threads is None:
            self._write_pieces(weights, target, starts, range(len(self.pieces)), first_rows)
            return
        # Pieces are of few kinds that take turns, so every share gets about as much to copy.
        shares = [range(first, len(self.pieces), NUM_SHARES) for first in range(NUM_SHARES)]
        list(threads.map(lambda share: self._write_pieces(weights, target, starts, share, first_rows), shares))

    def _write_pieces(
        self, weights: AdapterWeights, target: Array, starts: Ints, indices: Iterable[int], first_rows: Ints
    ) -> None:
        for index in indices:
            piece = self.pieces[index]
            source = _rows(piece, weights)
            pitch = aligned(piece.width)
            piece_starts = starts[first_rows[index] : first_rows[index] + piece.count]
            breaks = (np.flatnonzero(np.diff(piece_starts) != pitch) + 1).tolist()
            for first, last in zip([0, *breaks], [*breaks, piece.count], strict=True):
                start = int(piece_starts[first])
                rows = target[start : start + (last - first) * pitch].reshape(last - first, pitch)
                rows[:, : piece.width] = source[first:last]
                rows[:, piece.width :] = 0


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
        page_ends=packing.page_ends,
    )


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
