"""The metronome stands in for a worker: it has a worker's surface, and its tokens are counted."""

from __future__ import annotations

import pytest

from benchmarks import metronome
from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.request import EngineRequest, SamplingParams


async def test_a_metronome_answers_and_says_how_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(version: str) -> AdapterWeights:
        raise AssertionError

    monkeypatch.setenv("METRONOME_BEATS_PER_S", "500")
    worker = metronome.MetronomeWorker(
        worker_id="w", model=ModelConfig(id="m", source="m"), engine=EngineConfig(), pool=PoolConfig(), fetch=fetch
    )
    try:
        request = EngineRequest("r", None, (5,), SamplingParams(max_tokens=3))
        taken = [delta async for delta in worker.generate(request)]
        assert [delta.text for delta in taken] == [metronome.TEXT] * 3
        assert [delta.finish_reason for delta in taken] == [None, None, "length"]
        assert (await worker.state()).running == 0
        assert not worker.is_stalled
        worker.check_health()
    finally:
        worker.close()
