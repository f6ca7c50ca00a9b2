"""How long chunks are."""

from __future__ import annotations

import numpy as np
import pytest

from lorafleet.kernels.segments import BASE_SLOT, FEW_BATCH_ROWS, plan_segments


@pytest.mark.parametrize(
    ("rows_of_each", "chunk_length"),
    [
        ([1] * 64, 16),
        ([FEW_BATCH_ROWS], 16),  # one adapter's few rows make programs enough in short chunks
        ([FEW_BATCH_ROWS + 1], 128),
        ([64] * 8, 64),
        ([1000] + [1] * 99, 16),  # what adapters have on the whole, not what one has
        ([200, 200, 300], 128),
    ],
)
def test_chunks_are_as_long_as_adapters_have_rows(rows_of_each: list[int], chunk_length: int) -> None:
    slots = np.repeat(np.arange(len(rows_of_each), dtype=np.int32), rows_of_each)
    plan = plan_segments(slots)
    assert plan.shape.chunk_length == chunk_length
    assert plan.shape.num_lora_chunks == sum(-(-count // chunk_length) for count in rows_of_each)
    beside_base = plan_segments(np.concatenate([slots, np.full(FEW_BATCH_ROWS, BASE_SLOT, np.int32)]))
    assert beside_base.shape.num_chunks > beside_base.shape.num_lora_chunks
