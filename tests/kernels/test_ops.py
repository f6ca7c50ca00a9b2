"""The entry points' checks: a clear error, never a wrong number."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafleet.kernels import ops
from lorafleet.kernels.segments import BASE_SLOT, Segments, build_segments
from lorafleet.kernels.weights import LoraEmbeddingWeights, LoraWeights
from tests.kernels.paged import paged_embedding, paged_linear

CPU = torch.device("cpu")
ROWS, IN_DIM, OUT_DIM = 3, 24, 40


@pytest.fixture
def weights() -> LoraWeights:
    rng = np.random.default_rng(0)
    return paged_linear(
        rng, in_dim=IN_DIM, widths=(16, 24), ranks=[[2, 2], [4, 0]], dtype=torch.float32, device=CPU
    ).weights


@pytest.fixture
def embedding() -> LoraEmbeddingWeights:
    rng = np.random.default_rng(0)
    return paged_embedding(
        rng, num_embeddings=50, width=OUT_DIM, ranks=[2, 4], page_elements=32, dtype=torch.float32, device=CPU
    ).weights


def _segments(*slots: int) -> Segments:
    return build_segments(np.array(slots, dtype=np.int32), device=CPU)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(ROWS + 1, IN_DIM), "x must have shape (3, 24), got (4, 24)"),
        (torch.zeros(ROWS, IN_DIM + 1), "x must have shape (3, 24), got (3, 25)"),
        (torch.zeros(ROWS * IN_DIM), "x must have shape (3, 24), got (72,)"),
        (torch.zeros(ROWS, IN_DIM, dtype=torch.float16), "x must be torch.float32, got torch.float16"),
        (torch.zeros(IN_DIM, ROWS).t(), "x must have unit stride along its last dimension"),
        (torch.zeros(ROWS, IN_DIM, device="meta"), "x must be on the pool's device cpu, got meta"),
    ],
    ids=["rows", "width", "dims", "dtype", "stride", "device"],
)
def test_shrink_refuses_a_wrong_x(weights: LoraWeights, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.shrink(x, weights, _segments(0, 1, BASE_SLOT))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(ROWS - 1, OUT_DIM), "y must have shape (3, 40), got (2, 40)"),
        (torch.zeros(ROWS, OUT_DIM, dtype=torch.int32), "y must be torch.float32, got torch.int32"),
        (torch.zeros(OUT_DIM, ROWS).t(), "y must have unit stride"),
    ],
    ids=["rows", "dtype", "stride"],
)
def test_expand_refuses_a_wrong_y(weights: LoraWeights, y: Tensor, message: str) -> None:
    segments = _segments(0, 1, BASE_SLOT)
    h = ops.shrink(torch.zeros(ROWS, IN_DIM), weights, segments)
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.expand(h, weights, segments, y)


def test_expand_refuses_a_wrong_bias(weights: LoraWeights) -> None:
    segments = _segments(0, 1, BASE_SLOT)
    h, y = ops.shrink(torch.zeros(ROWS, IN_DIM), weights, segments), torch.zeros(ROWS, OUT_DIM)
    with pytest.raises(ValueError, match="accumulate=False only"):
        ops.expand(h, weights, segments, y, bias=torch.zeros(OUT_DIM))
    with pytest.raises(ValueError, match=r"bias must be a contiguous \(40,\)"):
        ops.expand(h, weights, segments, y, accumulate=False, bias=torch.zeros(OUT_DIM - 1))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        ops.expand(h, weights, segments, y, accumulate=False, bias=torch.zeros(OUT_DIM, dtype=torch.int64))


def test_a_slot_without_tables_is_refused(weights: LoraWeights, embedding: LoraEmbeddingWeights) -> None:
    segments = _segments(0, 2, BASE_SLOT)
    message = "slot 2 is out of range: the row tables have 2 slots"
    with pytest.raises(ValueError, match=message):
        ops.shrink(torch.zeros(ROWS, IN_DIM), weights, segments)
    with pytest.raises(ValueError, match=message):
        ops.embed(torch.zeros(ROWS, dtype=torch.int64), embedding, segments, torch.zeros(ROWS, OUT_DIM))


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (torch.zeros(ROWS + 1, dtype=torch.int64), "token_ids must have shape (3,), got (4,)"),
        (torch.zeros(ROWS), "token_ids must be int32 or int64, got torch.float32"),
        (torch.tensor([0, 50, 1]), "token ids must lie in [0, 50), got 0 to 50"),
        (torch.tensor([0, -1, 1]), "token ids must lie in [0, 50), got -1 to 1"),
    ],
    ids=["rows", "dtype", "beyond", "negative"],
)
def test_embed_refuses_wrong_token_ids(embedding: LoraEmbeddingWeights, token_ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.embed(token_ids, embedding, _segments(0, 1, BASE_SLOT), torch.zeros(ROWS, OUT_DIM))


@pytest.mark.parametrize(
    "broken",
    [
        lambda weights: {"ranks": weights.ranks.long()},
        lambda weights: {"scalings": weights.scalings.double()},
        lambda weights: {"a_rows": weights.a_rows[:, :1]},
        lambda weights: {"b_rows": weights.b_rows.mT.contiguous().mT},
        lambda weights: {"pool": weights.pool[::2]},
        lambda weights: {"part_slices": (0, 2)},
        lambda weights: {"part_widths": (16,)},
    ],
    ids=["ranks_dtype", "scalings_dtype", "a_shape", "b_stride", "pool_stride", "slice", "parts"],
)
def test_weights_refuse_tables_that_kernels_cannot_read(
    weights: LoraWeights, broken: Callable[[LoraWeights], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=r"must|each part"):
        dataclasses.replace(weights, **broken(weights))


def test_no_rows(weights: LoraWeights) -> None:
    segments = _segments()
    ops.add_lora(torch.zeros(0, IN_DIM), weights, segments, torch.zeros(0, OUT_DIM))
    h = ops.shrink(torch.zeros(0, IN_DIM), weights, segments)
    ops.expand(h, weights, segments, torch.zeros(0, OUT_DIM), accumulate=False)
