"""The device memory of adapters: rank-exact pages, and slot tables that say where each row of a resident adapter lies.

Owns no policy: `Residency` says who comes and goes. One engine thread calls it; `upload` alone may run in another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights, magnitude_of
from lorafleet.kernels.weights import (
    ROW_ALIGN,
    LoraEmbeddingWeights,
    LoraWeights,
    OutputVectors,
    OwnMatrix,
    OwnVector,
    VectorPart,
)
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.memory.extra_rows import Extra, ExtraMatrix, ExtraVector
from lorafleet.workers.memory.packing import Ints
from lorafleet.workers.memory.page_plan import PagePlan, elements_of_block, pack
from lorafleet.workers.memory.pages import PageAllocator
from lorafleet.workers.memory.pool_layout import PoolLayout, parts_of
from lorafleet.workers.memory.shares import part_of_extra
from lorafleet.workers.memory.upload import Uploader
from lorafleet.workers.ranks import Ranks

RowNorms = Callable[[str, Tensor, Tensor, float], Tensor]
"""(module, a, b, scaling): what is here of the factors, as in `AdapterWeights`, on the pool's device.

Returns (out_dim,) float32: for each output that is here, the sum of squares of its weights that are here, in the base's
matrix with scaling * B @ A added.
"""

_MAX_REMEMBERED_COUNTS = 1 << 16
_MAX_REMEMBERED_PLANS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """Pages and a slot that belong to one adapter version until `AdapterPool.free`."""

    manifest: AdapterManifest
    slot: int
    page_ids: tuple[int, ...]
    is_free_of_readers: torch.cuda.Event | None
    """Recorded when the pages were given out: kernels of their former owner have then run. None on a CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class UploadedAdapter:
    """An adapter whose pages are written, and whose slot is not live yet."""

    allocation: Allocation
    tables: Tensor
    """(num_tables, max_rank) int32 on the device."""
    ranks: Tensor
    """(num_columns,) int32 on the device."""
    scalings: Tensor
    """(num_columns,) float32 on the device."""
    extras: Mapping[str, Extra]
    """What the adapter brings beside low-rank factors, by name."""
    vectors: Tensor | None
    """(num_vector_parts,) int32 on the device; None: none of the extras has one row only."""
    matrices: Tensor | None
    """(num_matrices,) int64 on the device; None: none of the extras has a row a token."""
    partial_norms: tuple[tuple[ExtraVector, Tensor], ...] = ()
    """Magnitudes, and what `RowNorms` says of this rank's part of the weights that they are still to be divided by."""


class AdapterPool:
    """A flat tensor cut into equal pages. A page belongs to one adapter; a slot is the index of a resident adapter.

    Every element of the pool is finite at all times, whoever owned it: zero at first, then adapters' values and the
    zeros between a row's end and where the next may start. What no row of a page covers keeps what its former owners
    left there. Base rows need nothing here. Beside the pages there are the slots' tables, of a fixed size, and 4 bytes
    for each row of a matrix that a resident adapter replaces: 0.2 % of a row of 1,024 bfloat16.
    """

    def __init__(
        self,
        layout: PoolLayout,
        *,
        pool_bytes: int,
        max_slots: int,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """`max_slots`: 0 for a worker that serves no adapters; `pool_bytes` may be 0 then. `ranks`: those whose pools
        have the other parts; each makes the same calls in the same order, `upload` apart.

        Raises WorkerConfigError when `pool_bytes` holds no page, or more than row tables can address.
        """
        num_pages = pool_bytes // layout.page_bytes
        if num_pages == 0 and max_slots > 0:
            raise WorkerConfigError(
                f"adapters.pool_bytes must be at least one page of {layout.page_bytes} bytes; got {pool_bytes}"
            )
        if pool_bytes > layout.max_pool_bytes:
            raise WorkerConfigError(f"adapters.pool_bytes must be at most {layout.max_pool_bytes}; got {pool_bytes}")
        self.layout = layout
        self.device = device
        # An adapter has a page at least, so more slots than pages would never be used.
        self.num_slots = min(max_slots, num_pages)
        dtype = cast(torch.dtype, getattr(torch, layout.dtype))
        self._elements = torch.zeros(num_pages * layout.page_elements, dtype=dtype, device=device)
        shape = (self.num_slots, layout.num_tables, layout.max_rank)
        self._tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self._ranks = torch.zeros((self.num_slots, layout.num_columns), dtype=torch.int32, device=device)
        self._scalings = torch.zeros((self.num_slots, layout.num_columns), dtype=torch.float32, device=device)
        self._vectors = torch.full((self.num_slots, layout.num_vector_parts), -1, dtype=torch.int32, device=device)
        self._matrices = torch.zeros((self.num_slots, len(layout.matrices)), dtype=torch.int64, device=device)
        self._pages = PageAllocator(num_pages)
        self._slots = PageAllocator(self.num_slots)
        self._ranks_of_worker = ranks or Ranks()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._plans: dict[Hashable, PagePlan] = {}
        self._extras: dict[int, Mapping[str, Extra]] = {}
        self._vocabularies: dict[int, int] = {}
        self._ideal_bytes = 0
        self.absorbed: frozenset[str] = frozenset()
        """Modules whose LoRA is applied to queries and sums of latents, and not to each token."""
        self.row_norms: RowNorms | None = None
        """Who knows the base's weights sets it; adapters with magnitudes need it."""
        self.untabled: frozenset[str] = frozenset()
        """Names of extras that the model's layers do not find in the tables: such a step takes no captured graph."""
        block_elements = min(self._elements.numel(), elements_of_block(layout))
        self._uploader = Uploader(self._elements, block_elements=block_elements)

    @property
    def num_pages_total(self) -> int:
        return self._pages.num_total

    @property
    def num_pages_used(self) -> int:
        return self._pages.num_used

    @property
    def num_pages_free(self) -> int:
        return self._pages.num_free

    @property
    def num_slots_free(self) -> int:
        return self._slots.num_free

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that adapters own."""
        return self._pages.num_used * self.layout.page_bytes

    @property
    def ideal_bytes(self) -> int:
        """Bytes of the weights of the adapters that own pages, as far as they are here."""
        return self._ideal_bytes

    @property
    def extras(self) -> Mapping[int, Mapping[str, Extra]]:
        """Slot -> what its adapter brings beside low-rank factors; slots without any are not in it. A live view."""
        return MappingProxyType(self._extras)

    @property
    def vocabularies(self) -> Mapping[int, int]:
        """Slot -> how many tokens its adapter knows, where they are not the base's. A live view."""
        return MappingProxyType(self._vocabularies)

    def num_pages(self, manifest: AdapterManifest) -> int:
        """Pages that the adapter takes; remembered by version."""
        return self._size(manifest)[0]

    def _size(self, manifest: AdapterManifest) -> tuple[int, int]:
        """Pages of an adapter, and bytes of its weights that are here."""
        size = self._sizes.get(manifest.version)
        if size is None:
            if len(self._sizes) >= _MAX_REMEMBERED_COUNTS:
                self._sizes.clear()
            plan = self._plan(manifest)
            num_bytes = plan.num_elements * self._elements.itemsize
            size = self._sizes[manifest.version] = plan.num_pages, num_bytes
        return size

    def can_allocate(self, manifest: AdapterManifest) -> bool:
        return self._slots.can_allocate(1) and self._pages.can_allocate(self.num_pages(manifest))

    def allocate(self, manifest: AdapterManifest) -> Allocation:
        """Pages and a slot for the adapter; its rank stays 0 until `publish`. The caller has asked `can_allocate`."""
        assert self.can_allocate(manifest), manifest.version
        (slot,) = self._slots.allocate(1)
        page_ids = tuple(self._pages.allocate(self.num_pages(manifest)))
        self._ideal_bytes += self._size(manifest)[1]
        event = torch.cuda.current_stream(self.device).record_event() if self._uploader.stream else None
        return Allocation(manifest, slot, page_ids, event)

    def warm_up(self) -> None:
        """Launch every kernel that `upload` launches, on nothing: within `compiled_ahead` they are compiled."""
        if self.num_slots:
            self._uploader.warm_up()

    def upload(self, allocation: Allocation, weights: AdapterWeights) -> UploadedAdapter:
        """Lay the weights into the allocated pages and make the slot's table rows.

        May run in another thread than the engine's: it touches only the allocation's own pages. On CUDA the copies go
        from pinned memory over a side stream, and it waits for them: a step that was launched behind copies would keep
        every sequence waiting for one adapter.
        """
        assert weights.manifest.version == allocation.manifest.version, weights.manifest.version
        assert weights.dtype == self.layout.dtype, (weights.dtype, self.layout.dtype)
        layout = self.layout
        plan = self._plan(weights.manifest)
        assert plan.num_pages == len(allocation.page_ids), "packing is not what it was when the pages were counted"
        tables = self._host((layout.num_tables, layout.max_rank), torch.int32).zero_()
        starts = plan.starts(np.array(allocation.page_ids, dtype=np.int64))
        tables.numpy().reshape(-1)[plan.entries] = starts[: len(plan.entries)] // ROW_ALIGN
        modules = weights.manifest.modules
        ranks = self._host((layout.num_columns,), torch.int32).zero_()
        scalings = self._host((layout.num_columns,), torch.float32).zero_()
        for module in modules:
            place = layout.places[module.name]
            columns = slice(place.index, place.index + place.shape.num_experts)
            ranks.numpy()[columns], scalings.numpy()[columns] = module.rank, module.scaling

        stream = self._uploader.stream
        if stream is not None:
            assert allocation.is_free_of_readers is not None
            stream.wait_event(allocation.is_free_of_readers)
        self._uploader.write(plan, weights, starts)
        with self._uploader.on_stream():
            tables, ranks, scalings = (host.to(self.device, non_blocking=True) for host in (tables, ranks, scalings))
            extras, vectors = self._find_extras(weights, plan, starts)
            partial_norms = self._scale_magnitudes(weights, extras)
            matrices = self._point_to_matrices(extras)
        if stream is not None:
            stream.record_event().synchronize()
        return UploadedAdapter(allocation, tables, ranks, scalings, extras, vectors, matrices, partial_norms)

    def _plan(self, manifest: AdapterManifest) -> PagePlan:
        """The adapter's packing; remembered, since adapters of a fleet tend to have the same modules and ranks."""
        key = (tuple((module.name, module.rank) for module in manifest.modules), manifest.extras)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_REMEMBERED_PLANS:
                self._plans.clear()
            plan = self._plans[key] = pack(manifest, self.layout)
        return plan

    def publish(self, uploaded: UploadedAdapter) -> None:
        """Make the slot live, between two steps: kernels that are launched from now on see the adapter."""
        slot = uploaded.allocation.slot
        if self._uploader.stream is not None:
            stream = torch.cuda.current_stream(self.device)
            starts = [extra.starts for extra in uploaded.extras.values() if isinstance(extra, ExtraMatrix)]
            lines = [line for line in (uploaded.vectors, uploaded.matrices) if line is not None]
            squares = [each for _, each in uploaded.partial_norms]
            for tensor in (uploaded.tables, uploaded.ranks, uploaded.scalings, *starts, *lines, *squares):
                tensor.record_stream(stream)
        self._divide_by_sums(uploaded.partial_norms)
        self._tables[slot].copy_(uploaded.tables)
        self._scalings[slot].copy_(uploaded.scalings)
        self._ranks[slot].copy_(uploaded.ranks)
        if uploaded.extras:
            self._extras[slot] = uploaded.extras
        vocabulary = uploaded.allocation.manifest.vocabulary
        if vocabulary is not None:
            self._vocabularies[slot] = vocabulary
        if uploaded.vectors is not None:
            self._vectors[slot].copy_(uploaded.vectors)
        if uploaded.matrices is not None:
            self._matrices[slot].copy_(uploaded.matrices)

    def free(self, allocation: Allocation) -> None:
        """Take back pages and slot, whether or not the adapter was published; no `upload` of it may be running."""
        self._ranks[allocation.slot].zero_()
        self._vocabularies.pop(allocation.slot, None)
        if self._extras.pop(allocation.slot, None):
            self._vectors[allocation.slot].fill_(-1)
            self._matrices[allocation.slot].zero_()
        self._pages.free(allocation.page_ids)
        self._slots.free([allocation.slot])
        self._ideal_bytes -= self._size(allocation.manifest)[1]

    def weights(self, group: tuple[str, ...]) -> LoraWeights:
        """Views for linear modules: a group as the layout was given it, or one alone. Valid for the pool's life."""
        places = [self.layout.places[name] for name in group]
        assert all(place.shape.kind in ("linear", "router") for place in places), group
        first, num_slices = places[0], len(places)
        num_parts = sum(place.num_parts for place in places)
        assert [place.index for place in places] == list(range(first.index, first.index + num_slices)), group
        slices, starts, widths = [], [], []
        base = 0
        for index, place in enumerate(places):
            for start, width in parts_of(place.shape.out_dim, self.layout.page_elements):
                slices.append(index)
                starts.append(base + start)
                widths.append(width)
            base += place.shape.out_dim
        return LoraWeights(
            pool=self._elements,
            ranks=self._ranks[:, first.index : first.index + num_slices],
            scalings=self._scalings[:, first.index : first.index + num_slices],
            a_rows=self._tables[:, first.a_table : first.a_table + num_slices],
            b_rows=self._tables[:, first.b_table : first.b_table + num_parts],
            in_dim=first.shape.in_dim,
            part_slices=tuple(slices),
            part_starts=tuple(starts),
            part_widths=tuple(widths),
            vectors=self._output_vectors(group) if all(place.shape.is_module for place in places) else None,
            matrix=self._own_matrix(group[0]) if num_slices == 1 else None,
        )

    @property
    def expert_stride(self) -> int:
        """Distance of the same expert in neighbouring slots, in the slots of `expert_weights`."""
        return self.layout.num_tables

    def expert_weights(self, name: str) -> LoraWeights:
        """Views for experts, in which slot `slot * expert_stride + expert` is an adapter's part of one expert.

        Slots between those are other modules' and mean nothing here. Valid for the pool's life.
        """
        place, max_rank = self.layout.places[name], self.layout.max_rank
        assert place.shape.kind == "experts", name
        num_slots = max(0, (self.num_slots - 1) * self.expert_stride + place.shape.num_experts)
        assert num_slots * max_rank < 2**31, "kernels compute with int32"
        num_experts, parts = place.shape.num_experts, parts_of(place.shape.out_dim, self.layout.page_elements)
        columns = [table.view(-1)[place.index :][:num_slots, None] for table in (self._ranks, self._scalings)]
        tables = self._tables.view(-1)
        return LoraWeights(
            pool=self._elements,
            ranks=columns[0],
            scalings=columns[1],
            a_rows=tables.as_strided((num_slots, 1, max_rank), (max_rank, max_rank, 1), place.a_table * max_rank),
            b_rows=tables.as_strided(
                (num_slots, len(parts), max_rank), (max_rank, num_experts * max_rank, 1), place.b_table * max_rank
            ),
            in_dim=place.shape.in_dim,
            part_slices=(0,) * len(parts),
            part_starts=tuple(start for start, _ in parts),
            part_widths=tuple(width for _, width in parts),
        )

    def embedding_weights(self, name: str) -> LoraEmbeddingWeights:
        """Views for an embedding. Valid for the pool's life."""
        place = self.layout.places[name]
        assert place.shape.kind == "embedding", name
        parts = parts_of(place.shape.out_dim, self.layout.page_elements)
        return LoraEmbeddingWeights(
            pool=self._elements,
            ranks=self._ranks[:, place.index : place.index + 1],
            scalings=self._scalings[:, place.index : place.index + 1],
            a_pages=self._tables[:, place.a_table : place.a_table + place.num_a_tables].flatten(1),
            b_rows=self._tables[:, place.b_table : place.b_table + place.num_parts],
            num_embeddings=place.shape.in_dim,
            page_elements=self.layout.page_elements,
            part_slices=(0,) * len(parts),
            part_starts=tuple(start for start, _ in parts),
            part_widths=tuple(width for _, width in parts),
            vectors=self._output_vectors((name,)),
            matrix=self._own_matrix(name),
        )

    def vector(self, name: str) -> OwnVector:
        """View for a parameter of a norm. Valid for the pool's life."""
        return OwnVector(self._elements, self._vectors, self.layout.vectors[name].entry)

    def _own_matrix(self, module: str) -> OwnMatrix | None:
        entry = self.layout.matrices.get(f"{module}.weight")
        return None if entry is None else OwnMatrix(self._elements, self._matrices, entry)

    def _output_vectors(self, group: tuple[str, ...]) -> OutputVectors:
        parts: list[VectorPart] = []
        base = 0
        for name in group:
            added, scale = (self.layout.vectors[extra].entry for extra in (name, magnitude_of(name)))
            width = self.layout.places[name].shape.out_dim
            for part, (start, columns) in enumerate(parts_of(width, self.layout.page_elements)):
                parts.append(VectorPart(base + start, columns, added + part, scale + part))
            base += width
        return OutputVectors(self._elements, self._vectors, tuple(parts))

    def _host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._uploader.stream is not None)

    def _find_extras(
        self, weights: AdapterWeights, plan: PagePlan, starts: Ints
    ) -> tuple[dict[str, Extra], Tensor | None]:
        """The adapter's extras as they lie in the pool, and its line of the vectors' table. `starts`: the plan's."""
        found: dict[str, Extra] = {}
        line: Tensor | None = None
        by_name = plan.extra_starts(starts)
        for extra in weights.manifest.extras:
            parts = by_name[extra.name]
            here = part_of_extra(extra, self.layout.shares)
            if extra.name in self.layout.vectors:
                widths = [width for _, width in parts_of(here.width, self.layout.page_elements)]
                firsts = [int(part[0]) for part in parts]
                views = [self._elements[first : first + width] for first, width in zip(firsts, widths, strict=True)]
                found[extra.name] = ExtraVector(tuple(views))
                place = self.layout.vectors[extra.name]
                line = self._host((self.layout.num_vector_parts,), torch.int32).fill_(-1) if line is None else line
                line.numpy()[place.entry : place.entry + place.num_parts] = [first // ROW_ALIGN for first in firsts]
            else:
                host = self._host((here.num_rows,), torch.int32)
                host.numpy()[:] = parts[0] // ROW_ALIGN
                starts_there = host.to(self.device, non_blocking=True)
                found[extra.name] = ExtraMatrix(self._elements, starts_there, here.width)
        return found, None if line is None else line.to(self.device, non_blocking=True)

    def _point_to_matrices(self, extras: Mapping[str, Extra]) -> Tensor | None:
        """The adapter's line of the matrices' table."""
        tabled = {name: extra for name, extra in extras.items() if name in self.layout.matrices}
        places = {name: extra.starts.data_ptr() for name, extra in tabled.items() if isinstance(extra, ExtraMatrix)}
        if not places:
            return None
        line = self._host((len(self.layout.matrices),), torch.int64).zero_()
        for name, pointer in places.items():
            line[self.layout.matrices[name]] = pointer
        return line.to(self.device, non_blocking=True)

    @torch.no_grad()
    def _scale_magnitudes(
        self, weights: AdapterWeights, extras: Mapping[str, Extra]
    ) -> tuple[tuple[ExtraVector, Tensor], ...]:
        """Put magnitude / norm - 1 in the place of each magnitude: what a module's output is to be scaled by, less 1.

        The rounding to the pool's dtype is that of the difference, which is small. Returns `partial_norms`: what only
        the ranks together know.
        """
        partial: list[tuple[ExtraVector, Tensor]] = []
        tensors = weights.tensors if any(extra.kind == "magnitude" for extra in weights.manifest.extras) else {}
        for module in weights.manifest.modules:
            magnitude = extras.get(magnitude_of(module.name)) if tensors else None
            if isinstance(magnitude, ExtraVector):
                assert self.row_norms is not None, "nobody here knows the base's weights"
                a, b = (
                    torch.from_numpy(np.ascontiguousarray(array)).view(self._elements.dtype).to(self.device)
                    for array in self.layout.places[module.name].share.of_factors(*tensors[module.name])
                )
                squares = self.row_norms(module.name, a, b, module.scaling)
                if self.layout.places[module.name].is_sum:
                    partial.append((magnitude, squares))
                else:
                    magnitude.divide_by(squares.sqrt())
        return tuple(partial)

    @torch.no_grad()
    def _divide_by_sums(self, partial_norms: tuple[tuple[ExtraVector, Tensor], ...]) -> None:
        if partial_norms:
            squares = self._ranks_of_worker.all_reduce(torch.cat([each for _, each in partial_norms]))
            norms = torch.split(squares.sqrt(), [len(each) for _, each in partial_norms])
            for (magnitude, _), norm in zip(partial_norms, norms, strict=True):
                magnitude.divide_by(norm)
