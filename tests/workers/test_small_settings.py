"""Any settings that are accepted start a worker that answers, however small they are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.worker import Worker
from tests.workers.harness import Shelf, ask, greedy, random_prompt

GRID = [
    *product((1, 2), ("auto",), (1, 16, 64), (1, 4), (1,)),
    *product((1, 3), ("auto",), (7,), (256,), (1, 512)),
]


VALUES: Mapping[str, Sequence[Any]] = {
    "max_running": (1, 2, 64),
    "max_batch_tokens": (1, 3, 256),
    "kv_bytes": ("auto", 1, 40_000, 10**7),
    "kv_page_tokens": (1, 16, 300),
    "max_model_len": (2, 17, 64),
    "logits_chunk_tokens": (1, 512),
    "prefix_cache": (True, False),
    "speculation": (None, {}),
    "max_slots": (0, 1, 3),
    "pool_bytes": ("auto", 1, 10**6),
    "max_rank": (4, 64),
}
"""Settings and small values of each, and one that is not small."""


def pairwise(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Combinations in which any two values of two settings come together."""
    choices = {name: range(len(several)) for name, several in values.items()}
    missing = {
        ((one, i), (other, j)) for one, other in combinations(choices, 2) for i in choices[one] for j in choices[other]
    }
    draw = random.Random(0)
    while missing:
        (one, i), (other, j) = min(missing)
        drawn = [{name: draw.choice(several) for name, several in choices.items()} for _ in range(40)]
        rows = [row | {one: i, other: j} for row in drawn]
        best = max(rows, key=lambda row: len(missing.intersection(combinations(row.items(), 2))))
        missing.difference_update(combinations(best.items(), 2))
        yield {name: values[name][place] for name, place in best.items()}


PAIRS = [*pairwise(VALUES)]


def _of(settings: Mapping[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in kind.model_fields}


@pytest.mark.slow
@pytest.mark.parametrize("settings", PAIRS, ids=lambda settings: "-".join(str(value) for value in settings.values()))
async def test_any_two_small_settings_start_or_say_which_is_too_small(
    llama: Shelf, settings: Mapping[str, Any]
) -> None:
    """What the configuration allows starts and answers, for the base and an adapter; only memory may be too little."""
    max_model_len = settings["max_model_len"]
    engine = EngineConfig.model_validate({"device": "cpu", **_of(settings, EngineConfig)})
    pool = PoolConfig.model_validate(_of(settings, PoolConfig))
    model = ModelConfig(id="base", source=str(llama.base), max_model_len=max_model_len)
    is_short = settings["kv_bytes"] != "auto" or (settings["pool_bytes"] == 1 and settings["max_slots"] > 0)
    worker, refusal = None, ""
    try:
        worker = Worker(worker_id="w0", model=model, engine=engine, pool=pool, fetch=llama.fetch)
    except WorkerConfigError as error:
        refusal = str(error)
    if worker is None:
        assert is_short, refusal
        assert any(name in refusal for name in ("kv_bytes", "pool_bytes")), refusal
        return
    num_tokens = max(1, max_model_len // 2)
    prompt = random_prompt(max_model_len - num_tokens, 1)
    try:
        for version in (None, *(llama.versions[:1] if pool.max_slots else ())):
            assert len((await ask(worker, prompt, version, greedy(num_tokens))).tokens) == num_tokens
    finally:
        worker.close()


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
