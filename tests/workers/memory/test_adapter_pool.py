from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights, BaseGeometry, ModuleShape
from lorafleet.kernels.row_copy import place_rows
from lorafleet.kernels.weights import ROW_ALIGN, aligned
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.memory import page_plan
from lorafleet.workers.memory.adapter_pool import AdapterPool, Allocation
from lorafleet.workers.memory.page_plan import PagePlan, elements_of_block, pack
from lorafleet.workers.memory.pool_layout import MAX_PAGE_ROWS, PoolLayout
from tests.workers.memory.geometries import (
    ATTENTION,
    BIASES,
    EVERYTHING,
    GEOMETRIES,
    LAYER,
    MATRICES,
    NORMS,
    ODD,
    QKV,
    TINY,
    decoder,
    groups_of,
    manifest_of,
    weights_of,
)
from tests.workers.memory.readback import assert_serves

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
TINY_BF16 = decoder(layers=2, hidden=32, inner=48, kv=16, vocab=200)
of_every_kind = pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(TINY, id="fp32"),
        pytest.param(ODD, id="fp16_unaligned"),
        pytest.param(TINY_BF16, id="bf16"),
        pytest.param(GEOMETRIES["demo_344"], id="demo"),
    ],
)
EXTRAS = (*BIASES, *MATRICES, *NORMS)
TARGETS = [("q_proj", "v_proj"), QKV, ATTENTION, LAYER, EVERYTHING, ("embed_tokens",), ("lm_head", "down_proj")]


def make_pool(
    geometry: BaseGeometry, *, max_rank: int = 8, num_pages: int = 400, max_slots: int = 16, device: str = "cpu"
) -> AdapterPool:
    layout = PoolLayout.of(geometry, groups_of(geometry), max_rank)
    num_bytes = num_pages * layout.page_bytes
    return AdapterPool(layout, pool_bytes=num_bytes, max_slots=max_slots, device=torch.device(device))


def load(pool: AdapterPool, weights: AdapterWeights) -> Allocation:
    allocation = pool.allocate(weights.manifest)
    pool.publish(pool.upload(allocation, weights))
    return allocation


@pytest.mark.parametrize("device", DEVICES)
@of_every_kind
def test_tables_lead_to_every_value(geometry: BaseGeometry, device: str) -> None:
    pool = make_pool(geometry, num_pages=3000, device=device)
    resident = []
    for seed, (rank, targets) in enumerate([(r, t) for t in TARGETS for r in (1, 3, 8)][: pool.num_slots]):
        ranks = {"model.layers.1.self_attn.q_proj": 2, "model.layers.0.mlp.down_proj": 7}
        manifest = manifest_of(geometry, f"v{seed}", rank, targets, ranks)
        weights = weights_of(geometry, manifest, seed)
        resident.append((load(pool, weights), weights))
    for allocation, weights in resident:
        assert_serves(pool, groups_of(geometry), allocation.slot, weights)
    assert torch.isfinite(pool.embedding_weights("model.embed_tokens").pool).all()


@pytest.mark.parametrize("device", DEVICES)
@of_every_kind
def test_extras_lie_in_the_pages_too(geometry: BaseGeometry, device: str) -> None:
    pool = make_pool(geometry, num_pages=3000, device=device)
    cases = [(name,) for name in EXTRAS] + [(), BIASES, MATRICES, NORMS, EXTRAS]
    resident = []
    for seed, (extras, targets) in enumerate(zip(cases, 2 * TARGETS, strict=False)):
        weights = weights_of(geometry, manifest_of(geometry, f"v{seed}", 3, targets, extras=extras), seed)
        resident.append((load(pool, weights), weights))
    alone = weights_of(geometry, manifest_of(geometry, "alone", 0, (), extras=NORMS))
    resident.append((load(pool, alone), alone))
    for allocation, weights in resident:
        assert_serves(pool, groups_of(geometry), allocation.slot, weights)
    assert torch.isfinite(pool.embedding_weights("model.embed_tokens").pool).all()
    assert pool.num_pages_used == sum(len(set(allocation.page_ids)) for allocation, _ in resident)


def test_extras_are_there_from_publish_to_free() -> None:
    pool = make_pool(TINY)
    extras = pool.extras
    weights = weights_of(TINY, manifest_of(TINY, "v", 4, LAYER, extras=EXTRAS))
    allocation = pool.allocate(weights.manifest)
    uploaded = pool.upload(allocation, weights)
    assert not extras
    pool.publish(uploaded)
    assert extras.keys() == {allocation.slot}
    pool.free(allocation)
    assert not extras


@pytest.mark.parametrize("device", DEVICES)
def test_reused_pages_disturb_no_one(device: str) -> None:
    rng = np.random.default_rng(3)
    pool = make_pool(TINY, num_pages=360, max_slots=6, device=device)
    resident: list[tuple[Allocation, AdapterWeights]] = []
    for step in range(60):
        targets = TARGETS[rng.integers(len(TARGETS))]
        extras = [name for name in EXTRAS if rng.random() < 0.2]
        manifest = manifest_of(TINY, f"v{step}", int(rng.integers(1, 9)), targets, extras=extras)
        weights = weights_of(TINY, manifest, step)
        while not pool.can_allocate(weights.manifest):
            pool.free(resident.pop(int(rng.integers(len(resident))))[0])
        resident.append((load(pool, weights), weights))
        for allocation, of in resident:
            assert_serves(pool, groups_of(TINY), allocation.slot, of)
    pages = [page for allocation, _ in resident for page in allocation.page_ids]
    assert len(pages) == len(set(pages)) == pool.num_pages_used
    assert pool.ideal_bytes == sum(weights.manifest.num_bytes for _, weights in resident)
    for allocation, _ in resident:
        pool.free(allocation)
    assert (pool.num_pages_used, pool.ideal_bytes, pool.num_slots_free) == (0, 0, 6)


def test_a_slot_is_not_live_before_publish_nor_after_free() -> None:
    pool = make_pool(TINY)
    ranks = pool.weights(groups_of(TINY)[0]).ranks
    weights = weights_of(TINY, manifest_of(TINY, "v", 4, LAYER))
    allocation = pool.allocate(weights.manifest)
    uploaded = pool.upload(allocation, weights)
    assert not ranks.any()
    pool.publish(uploaded)
    assert ranks[allocation.slot].tolist() == [4, 4, 4]
    pool.free(allocation)
    assert not ranks.any()
    with pytest.raises(AssertionError):
        pool.free(allocation)


def test_a_slot_forgets_the_modules_of_its_former_adapter() -> None:
    pool = make_pool(TINY, max_slots=1)
    pool.free(load(pool, weights_of(TINY, manifest_of(TINY, "a", 8, EVERYTHING))))
    weights = weights_of(TINY, manifest_of(TINY, "b", 2, ("q_proj",)))
    assert_serves(pool, groups_of(TINY), load(pool, weights).slot, weights)


def test_uploads_run_beside_the_engine() -> None:
    pool = make_pool(TINY)
    served = weights_of(TINY, manifest_of(TINY, "served", 4, EVERYTHING))
    slot = load(pool, served).slot
    coming = [weights_of(TINY, manifest_of(TINY, f"v{seed}", 3, LAYER), seed) for seed in range(4)]
    allocations = [pool.allocate(weights.manifest) for weights in coming]
    uploaded = {}
    threads = [
        threading.Thread(target=lambda i=index: uploaded.update({i: pool.upload(allocations[i], coming[i])}))
        for index in range(4)
    ]
    for thread in threads:
        thread.start()
    assert_serves(pool, groups_of(TINY), slot, served)
    for thread in threads:
        thread.join()
    for index, weights in enumerate(coming):
        pool.publish(uploaded[index])
        assert_serves(pool, groups_of(TINY), allocations[index].slot, weights)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_waste_of_one_adapter(name: str, targets: tuple[str, ...]) -> None:
    geometry = GEOMETRIES[name]
    layout = PoolLayout.of(geometry, groups_of(geometry), 64)
    for rank in (4, 6, 8, 16, 24, 32, 64):
        manifest = manifest_of(geometry, "v", rank, targets)
        used = pack(manifest, layout).num_pages * layout.page_bytes
        assert manifest.num_bytes <= used <= 1.15 * manifest.num_bytes, (rank, used / manifest.num_bytes)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("extras", [MATRICES[:1], MATRICES[1:], EXTRAS], ids=["embedding", "head", "everything"])
def test_waste_of_an_adapter_with_matrices_of_its_own(name: str, extras: tuple[str, ...]) -> None:
    geometry = GEOMETRIES[name]
    layout = PoolLayout.of(geometry, groups_of(geometry), 64)
    for rank, targets in [(0, ()), (8, ("q_proj", "v_proj")), (16, LAYER)]:
        manifest = manifest_of(geometry, "v", rank, targets, extras=extras)
        used = pack(manifest, layout).num_pages * layout.page_bytes
        assert manifest.num_bytes <= used <= 1.15 * manifest.num_bytes, (rank, used / manifest.num_bytes)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_waste_of_a_mix(name: str) -> None:
    geometry = GEOMETRIES[name]
    layout = PoolLayout.of(geometry, groups_of(geometry), 64)
    mix = [(rank, targets) for rank in (4, 8, 16, 32, 64) for targets in TARGETS[:5]]
    manifests = [manifest_of(geometry, f"{rank}{targets}", rank, targets) for rank, targets in mix]
    ideal = sum(manifest.num_bytes for manifest in manifests)
    # `meta` holds no memory: only the account is asked for.
    pool = AdapterPool(layout, pool_bytes=2 * ideal, max_slots=64, device=torch.device("meta"))
    for manifest in manifests:
        pool.allocate(manifest)
    assert pool.ideal_bytes == ideal
    assert ideal <= pool.used_bytes <= 1.05 * ideal, pool.used_bytes / ideal


@pytest.mark.parametrize("geometry", [TINY, ODD, *GEOMETRIES.values()], ids=["tiny", "odd", *GEOMETRIES])
def test_rows_are_aligned_apart_and_within_a_page(geometry: BaseGeometry) -> None:
    layout = PoolLayout.of(geometry, groups_of(geometry), 48)
    widest = max(shape.in_dim for shape in geometry.modules.values() if shape.kind == "linear")
    assert layout.page_elements in [rows * aligned(max(widest, 48)) for rows in range(1, MAX_PAGE_ROWS + 1)]
    for rank, targets in [(1, LAYER), (5, EVERYTHING), (48, ("q_proj", "embed_tokens"))]:
        plan = pack(manifest_of(geometry, "v", rank, targets, extras=EXTRAS), layout)
        counts = [piece.count for piece in plan.pieces]
        widths = np.repeat([piece.width for piece in plan.pieces], counts)
        order = np.argsort(plan.offsets)
        ends = plan.offsets + widths
        assert (plan.offsets % ROW_ALIGN == 0).all()
        assert (plan.offsets[order][1:] >= ends[order][:-1]).all()
        assert (plan.offsets // layout.page_elements == (ends - 1) // layout.page_elements).all()
        assert ends.max() <= plan.num_pages * layout.page_elements
        assert len(set(plan.entries.tolist())) == len(plan.entries)
        assert plan.entries.max() < layout.num_tables * layout.max_rank


def test_packing_depends_on_nothing_else() -> None:
    layout = PoolLayout.of(TINY, groups_of(TINY), 8)
    manifest = manifest_of(TINY, "v", 5, EVERYTHING)
    first, second = pack(manifest, layout), pack(manifest, PoolLayout.of(TINY, groups_of(TINY), 8))
    np.testing.assert_array_equal(first.offsets, second.offsets)
    np.testing.assert_array_equal(first.entries, second.entries)


def plan_in_blocks(
    geometry: BaseGeometry, block_pages: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[PoolLayout, AdapterWeights, PagePlan]:
    """An adapter of everything, and its plan with blocks of about so many pages."""
    layout = PoolLayout.of(geometry, groups_of(geometry), 8)
    monkeypatch.setattr(page_plan, "BLOCK_BYTES", block_pages * layout.page_bytes)
    weights = weights_of(geometry, manifest_of(geometry, "v", 5, EVERYTHING, extras=EXTRAS))
    return layout, weights, pack(weights.manifest, layout)


@pytest.mark.parametrize("block_pages", [1, 3, 1000])
@pytest.mark.parametrize("geometry", [TINY, ODD], ids=["tiny", "odd"])
def test_blocks_are_whole_rows_and_all_of_an_adapter(
    geometry: BaseGeometry, block_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, weights, plan = plan_in_blocks(geometry, block_pages, monkeypatch)
    assert sorted(plan.order.tolist()) == list(range(len(plan.offsets)))
    assert plan.sources.tolist() == [0, *np.cumsum(plan.widths)[:-1].tolist()]
    assert plan.is_aligned == (geometry is TINY and not np.any(plan.widths % 8))
    rows = [row for block in plan.blocks for row in range(block.first_row, block.last_row)]
    assert rows == list(range(len(plan.order)))
    for block in plan.blocks:
        assert block.first == plan.sources[block.first_row]
        assert block.last == plan.sources[block.last_row - 1] + plan.widths[block.last_row - 1]
        assert block.last - block.first <= elements_of_block(layout)
    assert plan.blocks[-1].last == weights.flat.size
    assert len(plan.blocks) == 1 or block_pages < 1000


@pytest.mark.parametrize("block_pages", [1, 3, 1000])
@of_every_kind
def test_moves_of_blocks_are_those_of_the_whole(
    geometry: BaseGeometry, block_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, weights, plan = plan_in_blocks(geometry, block_pages, monkeypatch)
    starts = plan.starts(np.random.default_rng(0).permutation(plan.num_pages))
    source = torch.from_numpy(weights.flat).view(getattr(torch, geometry.dtype))
    moves = torch.empty((3, len(starts)), dtype=torch.int64)
    whole, of_blocks = (torch.zeros(plan.num_pages * layout.page_elements, dtype=source.dtype) for _ in range(2))
    place_rows(source, whole, torch.from_numpy(np.stack([plan.sources, plan.widths, starts[plan.order]])))
    plan.fill_moves(starts, moves.numpy())
    for block in reversed(plan.blocks):
        rows = moves[:, block.first_row : block.last_row]
        place_rows(source[block.first : block.last], of_blocks, rows, is_aligned=plan.is_aligned)
    assert torch.equal(whole, of_blocks)
    assert torch.count_nonzero(whole) == weights.flat.size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_pages", [1, 1000])
@of_every_kind
def test_rows_are_written_with_zeros_behind_and_nothing_else(
    geometry: BaseGeometry, block_pages: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_plan, "BLOCK_BYTES", block_pages * make_pool(geometry).layout.page_bytes)
    pool = make_pool(geometry, num_pages=3000, device=device)
    elements = pool.embedding_weights("model.embed_tokens").pool
    weights = weights_of(geometry, manifest_of(geometry, "v", 5, EVERYTHING, extras=EXTRAS))
    elements.fill_(torch.nan)
    allocation = load(pool, weights)
    plan = pack(weights.manifest, pool.layout)
    starts = plan.starts(np.array(allocation.page_ids))[plan.order]
    in_rows, in_padding = (np.zeros(elements.numel(), dtype=bool) for _ in range(2))
    for start, width in zip(starts.tolist(), plan.widths.tolist(), strict=True):
        assert not in_rows[start : start + aligned(width)].any()
        in_rows[start : start + width] = True
        in_padding[start + width : start + aligned(width)] = True
    assert weights.manifest.num_bytes == np.count_nonzero(in_rows) * elements.itemsize
    values = elements.float().cpu().numpy()
    assert np.isfinite(values[in_rows]).all()
    assert (values[in_rows] != 0).all()
    assert (values[in_padding] == 0).all()
    assert np.isnan(values[~in_rows & ~in_padding]).all()


def test_weights_may_be_read_only(recwarn: pytest.WarningsRecorder) -> None:
    """As they are in an object store."""
    weights = weights_of(TINY, manifest_of(TINY, "v", 5, EVERYTHING, extras=EXTRAS))
    assert not any(array.flags.writeable for array in (weights.flat, *weights.extras.values()))
    pool = make_pool(TINY)
    assert_serves(pool, groups_of(TINY), load(pool, weights).slot, weights)
    assert not recwarn.list


@pytest.mark.parametrize("device", DEVICES)
def test_warming_up_writes_nothing(device: str) -> None:
    pool = make_pool(TINY, device=device)
    elements = pool.embedding_weights("model.embed_tokens").pool.fill_(5.0)
    pool.warm_up()
    assert (elements == 5.0).all()
    make_pool(TINY, num_pages=0, max_slots=0, device=device).warm_up()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_pages", [1, 2, 1000])
def test_blocks_make_the_same_pool(block_pages: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_plan, "BLOCK_BYTES", block_pages * make_pool(TINY).layout.page_bytes)
    pool = make_pool(TINY, device=device)
    weights = weights_of(TINY, manifest_of(TINY, "v", 5, EVERYTHING, extras=EXTRAS))
    assert_serves(pool, groups_of(TINY), load(pool, weights).slot, weights)


def test_wide_outputs_are_split_into_parts() -> None:
    pool = make_pool(TINY)
    head = pool.weights(("lm_head",))
    size = pool.layout.page_elements
    assert size < 200
    assert head.part_starts == tuple(range(0, 200, size))
    assert sum(head.part_widths) == head.out_dim == 200
    assert set(head.part_slices) == {0}
    qkv = pool.weights(groups_of(TINY)[0])
    assert (qkv.part_slices, qkv.part_starts, qkv.part_widths) == ((0, 1, 2), (0, 32, 48), (32, 16, 16))
    assert (qkv.num_slices, qkv.max_rank, qkv.out_dim, qkv.in_dim) == (3, 8, 64, 32)


def test_a_base_with_no_vocabulary_modules_and_one_with_only_them() -> None:
    linear = BaseGeometry({"a.q": ModuleShape("linear", 32, 80)}, "float32")
    embedding = BaseGeometry({"wte": ModuleShape("embedding", 50, 24)}, "float32")
    for geometry in (linear, embedding):
        layout = PoolLayout.of(geometry, [], 4)
        pool = AdapterPool(layout, pool_bytes=100 * layout.page_bytes, max_slots=2, device=torch.device("cpu"))
        weights = weights_of(geometry, manifest_of(geometry, "v", 3, ("q", "wte")))
        assert_serves(pool, [], load(pool, weights).slot, weights)


def test_adapters_that_nobody_could_use_have_no_slots() -> None:
    pool = make_pool(TINY, num_pages=5, max_slots=1000)
    assert pool.num_slots == 5


def test_full_pool_and_full_slots_refuse() -> None:
    pool = make_pool(TINY, num_pages=40, max_slots=2)
    small = [manifest_of(TINY, f"v{i}", 1, ("q_proj",)) for i in range(3)]
    assert not pool.can_allocate(manifest_of(TINY, "large", 8, EVERYTHING))
    first = pool.allocate(small[0])
    pool.allocate(small[1])
    assert not pool.can_allocate(small[2])
    with pytest.raises(AssertionError):
        pool.allocate(small[2])
    pool.free(first)
    assert pool.can_allocate(small[2])


def test_sizes_that_hold_no_page_or_too_many_are_refused() -> None:
    layout = PoolLayout.of(TINY, groups_of(TINY), 8)
    for pool_bytes in (layout.page_bytes - 1, 1 << 40):
        with pytest.raises(WorkerConfigError, match=f"pool_bytes must be .* got {pool_bytes}"):
            AdapterPool(layout, pool_bytes=pool_bytes, max_slots=1, device=torch.device("meta"))


def test_our_own_mistakes_assert() -> None:
    pool = make_pool(TINY, max_rank=4)
    too_high: AdapterManifest = manifest_of(TINY, "high", 5, ("q_proj",))
    with pytest.raises(AssertionError):
        pool.num_pages(too_high)
    manifest = manifest_of(TINY, "v", 4, ("q_proj",))
    allocation = pool.allocate(manifest)
    with pytest.raises(AssertionError):
        pool.upload(allocation, weights_of(TINY, manifest_of(TINY, "other", 4, ("q_proj",))))
    with pytest.raises(AssertionError):
        pool.weights(("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"))
    with pytest.raises(AssertionError):
        pool.weights(("model.embed_tokens",))
    with pytest.raises(AssertionError):
        pool.embedding_weights("lm_head")
    with pytest.raises(AssertionError):
        PoolLayout.of(TINY, [("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")], 4)
