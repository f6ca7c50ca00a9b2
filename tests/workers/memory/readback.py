"""What a kernel finds when it follows a slot's tables into the pool."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lorafleet.adapter_store.manifest import AdapterWeights, Array
from lorafleet.kernels.weights import ROW_ALIGN, LoraEmbeddingWeights, LoraWeights
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.extra_rows import ExtraVector


def bits(tensor: Tensor) -> Array:
    """As numpy has it: bfloat16 bits are uint16."""
    tensor = tensor.cpu()
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def read_rows(pool: Tensor, starts: Tensor, width: int) -> Array:
    """(len(starts), width) rows that begin at `starts`, in ROW_ALIGN elements."""
    first = starts.long()[:, None] * ROW_ALIGN
    return bits(pool[first + torch.arange(width, device=pool.device)])


def read_b(weights: LoraWeights | LoraEmbeddingWeights, slot: int, slice_: int, rank: int) -> Array:
    """(rank, width) B of one slice, its parts side by side."""
    parts = [part for part, of in enumerate(weights.part_slices) if of == slice_]
    return np.concatenate(
        [read_rows(weights.pool, weights.b_rows[slot, part, :rank], weights.part_widths[part]) for part in parts],
        axis=1,
    )


def read_embedding_a(weights: LoraEmbeddingWeights, slot: int, rank: int) -> Array:
    """(num_embeddings, rank), by the formula of `LoraEmbeddingWeights`."""
    tokens = torch.arange(weights.num_embeddings, device=weights.pool.device)
    per_page = weights.page_elements // rank
    first = weights.a_pages[slot, tokens // per_page].long() * ROW_ALIGN + tokens % per_page * rank
    return bits(weights.pool[first[:, None] + torch.arange(rank, device=weights.pool.device)])


def assert_serves(pool: AdapterPool, groups: list[tuple[str, ...]], slot: int, weights: AdapterWeights) -> None:
    """The slot holds exactly `weights`: values, ranks, scalings, extras; rank 0 in every module it does not target."""
    modules = {module.name: module for module in weights.manifest.modules}
    grouped = {name for group in groups for name in group}
    for group in [*groups, *((name,) for name in pool.layout.places if name not in grouped)]:
        is_embedding = pool.layout.places[group[0]].shape.kind == "embedding"
        views = pool.embedding_weights(group[0]) if is_embedding else pool.weights(group)
        for slice_, name in enumerate(group):
            module = modules.get(name)
            assert views.ranks[slot, slice_] == (module.rank if module else 0), name
            if module is None:
                continue
            assert views.scalings[slot, slice_] == np.float32(module.scaling), name
            a, b = weights.tensors[name]
            if isinstance(views, LoraEmbeddingWeights):
                np.testing.assert_array_equal(read_embedding_a(views, slot, module.rank), a)
            else:
                rows = views.a_rows[slot, slice_, : module.rank]
                np.testing.assert_array_equal(read_rows(views.pool, rows, views.in_dim), a)
            np.testing.assert_array_equal(read_b(views, slot, slice_, module.rank), b)
    assert pool.extras.get(slot, {}).keys() == weights.extras.keys()
    for name, expected in weights.extras.items():
        np.testing.assert_array_equal(read_extra(pool, slot, name), expected)


def read_extra(pool: AdapterPool, slot: int, name: str) -> Array:
    """(num_rows, width) of what the slot's adapter brings under that name."""
    extra = pool.extras[slot][name]
    if isinstance(extra, ExtraVector):
        return bits(torch.cat(extra.parts))[None]
    return read_rows(extra.pool, extra.starts, extra.width)
