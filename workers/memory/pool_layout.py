"""Layout of a pool for adapters of one base: page size, rows of each module, and its place in the slot tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from lorafleet.adapter_store.manifest import (
    AdapterManifest,
    BaseGeometry,
    Dtype,
    ExtraManifest,
    ModuleManifest,
    ModuleShape,
    magnitude_of,
)
from lorafleet.adapter_store.targets import is_output
from lorafleet.kernels.weights import ROW_ALIGN, aligned
from lorafleet.workers.memory.packing import count_pages
from lorafleet.workers.memory.shares import ExtraPart, Share, part_of_extra

MAX_PAGE_ROWS = 8
"""A page is at most this many rows of the widest input."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` rows of one width, out of one tensor of an adapter, that go into the pool as they are.

    Row `i` is elements `start + i * stride` to `... + width` of `AdapterWeights.flat`.
    """

    name: str
    """A module's, or an extra's."""
    kind: Literal["a", "b", "extra"]
    part: int
    """Which part of B or of an extra; 0 for A."""
    entry: int
    """Entry of the first row in the row table; extras are in no table."""
    start: int
    stride: int
    width: int
    count: int
    run: int = 0
    """Rows of one row table, where those after them are in the next one (experts); 0: all are neighbours."""


def pieces_of(
    module: ModuleManifest, whole: ModuleShape, page_elements: int, base: int = 0, share: Share | None = None
) -> list[Piece]:
    """The rows that one module of an adapter puts into the pool, none wider than a page.

    `whole`: the module's shape. `base`: where its tensors begin in the adapter's array. `share`: the part of it that is
    here; by default all.
    """
    name, rank = module.name, module.rank
    num_rows = rank * whole.num_experts
    run = rank if whole.num_experts > 1 else 0
    share = share or Share.whole(whole)
    shape, end = share.shape, base + num_rows * whole.in_dim
    first_row, num_rows = rank * share.first_expert, rank * shape.num_experts
    if shape.kind != "embedding":
        base += first_row * whole.in_dim + share.first_input
        pieces = [Piece(name, "a", 0, 0, base, stride=whole.in_dim, width=shape.in_dim, count=num_rows, run=run)]
    else:
        base += rank * share.first_input
        # A token's values are `rank` neighbours; a row is as many whole tokens as a page holds.
        tokens = page_elements // rank
        full, rest = divmod(shape.in_dim, tokens)
        row = tokens * rank
        pieces = [Piece(name, "a", 0, 0, start=base, stride=row, width=row, count=full)] if full else []
        if rest:
            pieces.append(Piece(name, "a", 0, full, start=base + full * row, stride=row, width=rest * rank, count=1))
    base = end + first_row * whole.out_dim + share.first_output
    for part, (start, width) in enumerate(parts_of(shape.out_dim, page_elements)):
        pieces.append(
            Piece(name, "b", part, 0, base + start, stride=whole.out_dim, width=width, count=num_rows, run=run)
        )
    return pieces


def extra_pieces_of(extra: ExtraManifest, here: ExtraPart, page_elements: int, base: int) -> list[Piece]:
    """The rows of an extra, a piece a part. The rows of a matrix have one part, for they are found by one start.

    `here`: what of it is here. `base`: where the extra begins in the adapter's array.
    """
    assert here.num_rows == 1 or here.width <= page_elements, (extra, page_elements)
    base += here.first_row * extra.width + here.first_column
    return [
        Piece(extra.name, "extra", part, 0, start=base + start, stride=extra.width, width=width, count=here.num_rows)
        for part, (start, width) in enumerate(parts_of(here.width, page_elements))
    ]


def parts_of(out_dim: int, page_elements: int) -> list[tuple[int, int]]:
    """First column and width of each part of a row that may be wider than a page: whole pages, and what is left."""
    return [(start, min(page_elements, out_dim - start)) for start in range(0, out_dim, page_elements)]


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """One module's place in the tables of a slot."""

    whole: ModuleShape
    share: Share
    """What of it is here."""
    index: int
    """Column of the module's rank and scaling; experts have a column each."""
    a_table: int
    """Row table of A; an embedding's A may fill those after it too, and experts have one each."""
    num_a_tables: int
    b_table: int
    """Row table of B's first part; one table a part, and of experts one each for the first part, then for the next."""
    num_parts: int

    @property
    def shape(self) -> ModuleShape:
        """Of the part that is here."""
        return self.share.shape

    @property
    def is_sum(self) -> bool:
        """True if outputs are sums over ranks, each with some of the inputs."""
        return self.shape.in_dim < self.whole.in_dim


@dataclass(frozen=True, slots=True)
class VectorPlace:
    """Place in a slot's table of a row of an adapter's own (a norm's, a bias, a scale): an entry a part."""

    entry: int
    num_parts: int


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """Properties of the base that the pool needs. Made by `PoolLayout.of`."""

    dtype: Dtype
    max_rank: int
    page_elements: int
    places: Mapping[str, ModulePlace]
    num_tables: int
    """Row tables of a slot, each of `max_rank` entries."""
    num_columns: int
    """Ranks and scalings of a slot. With experts as many as tables: a step between slots is then one for all."""
    vectors: Mapping[str, VectorPlace]
    """By the extra's name; those that have more than one row are in no table."""
    num_vector_parts: int
    matrices: Mapping[str, int]
    """Matrix with a row a token, by the extra's name -> its entry in the table of a slot."""
    shares: Mapping[str, Share]
    """What is here of modules that are cut."""

    @staticmethod
    def of(
        geometry: BaseGeometry,
        groups: Sequence[tuple[str, ...]],
        max_rank: int,
        shares: Mapping[str, Share] = MappingProxyType({}),
    ) -> PoolLayout:
        """`groups`: modules that share their input, in the order of their outputs; the others stand alone.

        The modules of a group are neighbours in the tables, so that one view serves them all. `shares`: what is here of
        the base's modules; those that are not in it are whole. Ranks whose parts are of equal sizes lay out alike.
        """
        whole, geometry = geometry, _here(geometry, shares)
        page_elements = choose_page_elements(geometry, max_rank)
        grouped = {name for group in groups for name in group}
        assert len(grouped) == sum(map(len, groups)), "a module is in two groups"
        assert grouped <= geometry.modules.keys(), grouped - geometry.modules.keys()
        places: dict[str, ModulePlace] = {}
        num_tables = num_columns = 0
        for group in [*groups, *((name,) for name in geometry.modules if name not in grouped)]:
            shapes = [geometry.modules[name] for name in group]
            assert len({shape.in_dim for shape in shapes}) == 1, f"{group} do not share their input"
            assert len(group) == 1 or all(shape.kind == "linear" for shape in shapes), f"{group} has others than linear"
            a_sizes = [_num_a_tables(shape, page_elements, max_rank) for shape in shapes]
            a_table, b_table = num_tables, num_tables + sum(a_sizes)
            for name, shape, a_size in zip(group, shapes, a_sizes, strict=True):
                num_parts = len(parts_of(shape.out_dim, page_elements))
                share = shares.get(name) or Share.whole(shape)
                place = ModulePlace(whole.modules[name], share, num_columns, a_table, a_size, b_table, num_parts)
                places[name] = place
                a_table += a_size
                b_table += num_parts * shape.num_experts
                num_columns += shape.num_experts
            num_tables = b_table
        if any(place.shape.kind == "experts" for place in places.values()):
            assert num_columns <= num_tables, "each has a table at least"
            num_columns = num_tables
        vectors, num_vector_parts = _vector_places(geometry, page_elements)
        return PoolLayout(
            geometry.dtype,
            max_rank,
            page_elements,
            MappingProxyType(places),
            num_tables,
            num_columns,
            vectors,
            num_vector_parts,
            MappingProxyType(_matrices(whole)),
            shares,
        )

    @property
    def page_bytes(self) -> int:
        return self.page_elements * (4 if self.dtype == "float32" else 2)

    @property
    def max_pool_bytes(self) -> int:
        """The largest pool whose rows int32 tables can address."""
        return (ROW_ALIGN << 31) // self.page_elements * self.page_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of the tables of one slot, which the pool keeps beside its pages."""
        return 4 * (self.num_tables * self.max_rank + 2 * self.num_columns + self.num_vector_parts) + 8 * len(
            self.matrices
        )

    def pieces(self, manifest: AdapterManifest) -> list[Piece]:
        """The rows of all modules of an adapter, then those of its extras."""
        pieces = []
        base = 0
        for module in manifest.modules:
            assert 0 < module.rank <= self.max_rank, (module.name, module.rank, self.max_rank)
            place = self.places[module.name]
            pieces += pieces_of(module, place.whole, self.page_elements, base, place.share)
            base += place.whole.num_elements(module.rank)
        for extra in manifest.extras:
            pieces += extra_pieces_of(extra, part_of_extra(extra, self.shares), self.page_elements, base)
            base += extra.num_rows * extra.width
        return pieces


def _here(geometry: BaseGeometry, shares: Mapping[str, Share]) -> BaseGeometry:
    """The geometry with the shapes of the parts that are here."""
    modules = {name: shares[name].shape if name in shares else shape for name, shape in geometry.modules.items()}
    return replace(geometry, modules=modules)


def count_piece_pages(pieces: Iterable[Piece], page_elements: int) -> int:
    """Pages that the pieces of one adapter take."""
    sizes = np.array([(aligned(piece.width), piece.count) for piece in pieces], dtype=np.int64).reshape(-1, 2)
    return count_pages(sizes[:, 0], sizes[:, 1], page_elements)


def choose_page_elements(geometry: BaseGeometry, max_rank: int) -> int:
    """The page size, in elements, that wastes least: 1 to `MAX_PAGE_ROWS` rows of the widest input.

    A row of A is never split, so the widest input of a linear module sets the unit; outputs wider than a page are
    split. Each size is tried on adapters of rank 8: one for every target alone, and one for all of them.
    """
    modules = geometry.modules
    # One token of an embedding's A, which has `max_rank` elements at most, has to fit too, and what an adapter may
    # replace: a norm, and a token's row of an embedding.
    rows = [shape.out_dim if shape.kind == "embedding" else shape.in_dim for shape in modules.values()]
    unit = aligned(max([max_rank, *rows, *geometry.vectors.values()]))
    by_target: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        by_target[name.rpartition(".")[2]].append(name)
    probes = [[ModuleManifest(name, 8, 1.0) for name in names] for names in [*by_target.values(), [*modules]]]

    def waste(page_elements: int) -> float:
        total = 0.0
        for probe in probes:
            pieces = [piece for module in probe for piece in pieces_of(module, modules[module.name], page_elements)]
            ideal = sum(piece.width * piece.count for piece in pieces)
            total += count_piece_pages(pieces, page_elements) * page_elements / ideal
        return total

    return min((rows * unit for rows in range(1, MAX_PAGE_ROWS + 1)), key=waste)


def _vector_places(geometry: BaseGeometry, page_elements: int) -> tuple[Mapping[str, VectorPlace], int]:
    widths = {name: shape.out_dim for name, shape in geometry.modules.items() if shape.is_module}
    widths |= {magnitude_of(name): width for name, width in widths.items()} | dict(geometry.vectors)
    places: dict[str, VectorPlace] = {}
    num_parts = 0
    for name, width in widths.items():
        places[name] = VectorPlace(num_parts, len(parts_of(width, page_elements)))
        num_parts += places[name].num_parts
    return MappingProxyType(places), num_parts


def _matrices(geometry: BaseGeometry) -> dict[str, int]:
    shapes = geometry.modules.items()
    names = [name for name, shape in shapes if shape.kind == "embedding" or is_output(name, shape, geometry)]
    return {f"{name}.weight": entry for entry, name in enumerate(names)}


def _num_a_tables(shape: ModuleShape, page_elements: int, max_rank: int) -> int:
    if shape.kind != "embedding":
        return shape.num_experts
    max_rows = -(-shape.in_dim // (page_elements // max_rank))
    return -(-max_rows // max_rank)
