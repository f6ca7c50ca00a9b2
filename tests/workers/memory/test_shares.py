"""Adapters of a base that is cut for ranks: what each rank's pool holds, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from lorafleet.adapter_store.manifest import AdapterWeights, BaseGeometry
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.extra_rows import ExtraMatrix, ExtraVector
from lorafleet.workers.memory.page_plan import pack
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.memory.shares import Share
from tests.workers.memory.geometries import (
    BIASES,
    EVERYTHING,
    GEOMETRIES,
    LAYER,
    MATRICES,
    NORMS,
    TINY,
    decoder,
    groups_of,
    manifest_of,
    weights_of,
)
from tests.workers.memory.readback import bits, read_b, read_embedding_a, read_rows

BY_INPUTS = ("o_proj", "down_proj", "embed_tokens")
MAGNITUDES = tuple(f"model.layers.0.{name}.lora_magnitude_vector" for name in ("self_attn.k_proj", "mlp.down_proj"))


def shares_of(geometry: BaseGeometry, rank: int, size: int) -> dict[str, Share]:
    """Every module cut evenly, as a plan of transformers says."""
    shares = {}
    for name, shape in geometry.modules.items():
        is_by_inputs = name.endswith(BY_INPUTS)
        count = (shape.in_dim if is_by_inputs else shape.out_dim) // size
        cut = Share.of_inputs if is_by_inputs else Share.of_outputs
        shares[name] = cut(shape, rank * count, count)
    return shares


def layout_of(geometry: BaseGeometry, shares: Mapping[str, Share], max_rank: int = 8) -> PoolLayout:
    return PoolLayout.of(geometry, groups_of(geometry), max_rank, shares)


def assert_holds(pool: AdapterPool, slot: int, weights: AdapterWeights, shares: Mapping[str, Share]) -> None:
    """The slot has the slices of the whole that are the rank's, and nothing else."""
    for module in weights.manifest.modules:
        a, b = weights.tensors[module.name]
        share = shares[module.name]
        inputs = slice(share.first_input, share.first_input + share.shape.in_dim)
        outputs = slice(share.first_output, share.first_output + share.shape.out_dim)
        if share.shape.kind == "embedding":
            embedding = pool.embedding_weights(module.name)
            np.testing.assert_array_equal(read_embedding_a(embedding, slot, module.rank), a[inputs])
            np.testing.assert_array_equal(read_b(embedding, slot, 0, module.rank), b[:, outputs])
            continue
        group = next((group for group in groups_of_pool(pool) if module.name in group), (module.name,))
        views, index = pool.weights(group), group.index(module.name)
        rows = read_rows(views.pool, views.a_rows[slot, index, : module.rank], views.in_dim)
        np.testing.assert_array_equal(rows, a[:, inputs])
        np.testing.assert_array_equal(read_b(views, slot, index, module.rank), b[:, outputs])
    for name, array in weights.extras.items():
        own, extra = shares.get(name.removesuffix(".weight").partition(".lora_")[0]), pool.extras[slot][name]
        if isinstance(extra, ExtraMatrix):
            assert own is not None
            first = own.first_input + own.first_output
            found = read_rows(pool.weights(("lm_head",)).pool, extra.starts, extra.width)
            np.testing.assert_array_equal(found, array[first : first + len(extra.starts)])
        elif not name.endswith("vector"):
            assert isinstance(extra, ExtraVector)
            first = 0 if own is None else own.first_output
            value = np.concatenate([bits(part) for part in extra.parts])
            np.testing.assert_array_equal(value, array[0, first : first + len(value)])


def groups_of_pool(pool: AdapterPool) -> list[tuple[str, ...]]:
    geometry = BaseGeometry({name: place.whole for name, place in pool.layout.places.items()}, pool.layout.dtype)
    return groups_of(geometry)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "geometry", [TINY, decoder(layers=2, hidden=32, inner=56, kv=16, vocab=248)], ids=["fp32", "bf16_unaligned"]
)
def test_each_rank_holds_its_slices(geometry: BaseGeometry, size: int) -> None:
    for rank in range(size):
        shares = shares_of(geometry, rank, size)
        layout = layout_of(geometry, shares)
        pool = AdapterPool(layout, pool_bytes=2000 * layout.page_bytes, max_slots=4, device=torch.device("cpu"))
        pool.row_norms = lambda name, a, b, scaling: torch.ones_like(b[0]).float()
        for seed, extras in enumerate([(), (*BIASES, *MATRICES, *NORMS)]):
            manifest = manifest_of(geometry, f"v{seed}", 8 - seed, EVERYTHING, extras=extras)
            weights = weights_of(geometry, manifest, seed)
            allocation = pool.allocate(manifest)
            pool.publish(pool.upload(allocation, weights))
            assert_holds(pool, allocation.slot, weights, shares)
        assert pool.num_pages_used > 0
        held = sum(shape.in_dim + shape.out_dim for shape in (share.shape for share in shares.values()))
        assert pack(manifest_of(geometry, "plain", 8, EVERYTHING), layout).num_elements == 8 * held


def test_norms_of_magnitudes_are_sums_over_ranks() -> None:
    """A module that is cut by inputs has its norms when it is published; another has them at once."""
    geometry, size = TINY, 2
    shares = shares_of(geometry, 0, size)
    layout = layout_of(geometry, shares)
    pool = AdapterPool(layout, pool_bytes=2000 * layout.page_bytes, max_slots=4, device=torch.device("cpu"))
    pool.row_norms = lambda name, a, b, scaling: torch.full_like(b[0], 4.0)
    manifest = manifest_of(geometry, "v", 4, LAYER, extras=MAGNITUDES)
    weights = weights_of(geometry, manifest)
    uploaded = pool.upload(pool.allocate(manifest), weights)
    key, down = (uploaded.extras[name] for name in MAGNITUDES)
    assert isinstance(key, ExtraVector)
    assert isinstance(down, ExtraVector)
    wanted = [np.asarray(weights.extras[name][0], dtype=np.float64) / 2 - 1 for name in MAGNITUDES]
    np.testing.assert_allclose(key.parts[0].numpy(), wanted[0][:8], rtol=1e-6)
    assert [magnitude for magnitude, _ in uploaded.partial_norms] == [down]
    pool.publish(uploaded)
    np.testing.assert_allclose(torch.cat(down.parts).numpy(), wanted[1], rtol=1e-6)


@pytest.mark.parametrize(("size", "most"), [(2, 1.38), (4, 2.15)])
@pytest.mark.parametrize("name", ["llama_8b", "llama_7b"])
def test_ranks_lay_out_alike_and_take_little_more_than_the_file(name: str, size: int, most: float) -> None:
    """A is whole where outputs are cut, and B where inputs are."""
    geometry = GEOMETRIES[name]
    manifest = manifest_of(geometry, "v", 16, LAYER)
    plans = [pack(manifest, layout_of(geometry, shares_of(geometry, rank, size), 16)) for rank in range(size)]
    assert len({(plan.num_pages, plan.page_elements) for plan in plans}) == 1
    taken = sum(plan.num_pages * plan.page_elements * 2 for plan in plans)
    assert taken <= most * manifest.num_bytes
    alone = pack(manifest, layout_of(geometry, {}, 16))
    assert alone.num_elements * 2 == manifest.num_bytes
