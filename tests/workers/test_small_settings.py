"""Any settings that are accepted start a worker that answers, however small they are."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.worker import Worker
from tests.workers.harness import Shelf, ask, greedy, random_prompt

GRID = [
    *product((1, 2), ("auto",), (1, 16, 64), (1, 4), (1,)),
    *product((1, 3), ("auto",), (7,), (256,), (1, 512)),
]


@pytest.mark.parametrize(("max_running", "kv_bytes", "kv_page_tokens", "max_batch_tokens", "logits_chunk"), GRID)
async def test_small_settings_start(
    llama: Shelf, max_running: int, kv_bytes: str, kv_page_tokens: int, max_batch_tokens: int, logits_chunk: int
) -> None:
    engine = EngineConfig.model_validate(
        {
            "device": "cpu",
            "max_running": max_running,
            "kv_bytes": kv_bytes,
            "kv_page_tokens": kv_page_tokens,
            "max_batch_tokens": max_batch_tokens,
            "logits_chunk_tokens": logits_chunk,
        }
    )
    await start_and_answer(llama.base, engine, PoolConfig(max_rank=1, max_slots=1), max_model_len=32)


@pytest.mark.parametrize("max_model_len", [2, 16, 17])
@pytest.mark.parametrize("pool", [{"max_slots": 0}, {"max_slots": 1, "max_rank": 1}, {"max_slots": 2, "max_rank": 512}])
async def test_short_models_start(llama: Shelf, max_model_len: int, pool: dict[str, int]) -> None:
    engine = EngineConfig(device="cpu", max_running=1, prefix_cache=False)
    await start_and_answer(llama.base, engine, PoolConfig(**pool), max_model_len=max_model_len)


async def start_and_answer(base: Path, engine: EngineConfig, pool: PoolConfig, max_model_len: int) -> None:
    """A request that takes the whole length is answered to its end."""

    async def fetch(version: str) -> None:
        raise AssertionError(version)

    model = ModelConfig(id="base", source=str(base), max_model_len=max_model_len)
    worker = Worker(worker_id="w0", model=model, engine=engine, pool=pool, fetch=fetch)  # type: ignore[arg-type]
    try:
        num_tokens = max(1, max_model_len // 2)
        answer = await ask(worker, random_prompt(max_model_len - num_tokens, 1), None, greedy(num_tokens))
        assert len(answer.tokens) == num_tokens
    finally:
        worker.close()
