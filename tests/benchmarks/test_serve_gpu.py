"""benchmarks/serve_gpu.py, with everything small and on the CPU."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import ModuleType

import pytest

from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.cluster.config import AppConfig
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.model.geometry import read_geometry


@pytest.fixture(scope="module")
def serve_gpu(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("serve_gpu")


def test_adapters_of_one_file_are_versions_of_their_own(serve_gpu: ModuleType, tmp_path: Path) -> None:
    serve_gpu.write_base(tmp_path / "base", "tiny")
    work = serve_gpu.Work("tiny", adapters=7, adapter_files=2)
    serve_gpu.write_adapters(work, tmp_path)
    model = ModelConfig(id="base", source=str(tmp_path / "base"), dtype="bfloat16")
    reader = AdapterReader(read_geometry(model), 16)
    versions = {reader.read(tmp_path / "adapters" / f"a{i}").manifest.version for i in range(7)}
    assert len(versions) == 7
    files = {(tmp_path / "adapters" / f"a{i}" / "adapter_model.safetensors").stat().st_ino for i in range(7)}
    assert len(files) == 2


def test_workers_share_a_gpu_that_holds_all(serve_gpu: ModuleType, tmp_path: Path) -> None:
    """The settings of two workers on one GPU, in full size: their memory fits, and no adapter is ever evicted."""
    serve_gpu.write_base(tmp_path / "base", "llama-8b")
    config = AppConfig.model_validate(serve_gpu.app_values(serve_gpu.FULL, tmp_path, 2, has_gpu=True))
    assert (config.worker.num_replicas, config.worker.num_gpus) == (2, 0.5)
    adapters, weights = config.adapters, 16.1e9
    assert isinstance(adapters.pool_bytes, int)
    assert isinstance(config.worker.kv_bytes, int)
    assert adapters.pool_bytes > 64 * 84e6
    assert config.worker.kv_bytes > 32 * 640 * 131072
    assert 2 * (weights + adapters.pool_bytes + config.worker.kv_bytes) < 0.9 * 80e9


def test_shares_are_all_the_clients(serve_gpu: ModuleType) -> None:
    work = serve_gpu.FULL
    shares = [serve_gpu.Share(work, i, 3, seed=1) for i in range(3)]
    jobs = [job for share in shares for job in share.jobs()]
    assert len(jobs) == work.clients
    assert {len(requests) for requests in jobs} == {work.requests}
    assert {model for requests in jobs for model, _ in requests} == {f"a{i}" for i in range(work.adapters)}
    assert all(len(prompt) == work.prompt for requests in jobs for _, prompt in requests)


def test_what_takes_too_long_ends_and_shows_why(
    serve_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang(way: str, work: object, folder: Path, *_: object) -> None:
        logs = folder / "ray" / "session_latest" / "logs" / "serve"
        logs.mkdir(parents=True)
        (logs / "replica.log").write_text("no memory is left")
        time.sleep(30)

    monkeypatch.setattr(serve_gpu, "measure", hang)
    with pytest.raises(TimeoutError, match="not done within 0 s"):
        serve_gpu.main(["--tiny", "--ways", "engines", "--out", str(tmp_path / "x"), "--seconds", "0.3"])
    assert "no memory is left" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
def test_both_ways_are_measured(serve_gpu: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serve.jsonl"
    serve_gpu.main(["--tiny", "--workers", "1", "--ways", "engine,http", "--out", str(out), "--commit", "abc"])
    lines = {line["case"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert lines.keys() == {"engine", "http"}
    for line in lines.values():
        assert line["output_tokens"] == serve_gpu.TINY.clients * serve_gpu.TINY.requests * serve_gpu.TINY.output
        assert line["commit"] == "abc"
    assert lines["http"]["cpu_us_per_token_ingress"] > 0
    said = capfd.readouterr().out
    assert "tokens/s over HTTP, of one engine on the whole GPU" in said
    assert "unseen  tokens/s over HTTP, of the same engines in-process" in said


async def test_requests_at_random_times_wait_for_nobody(serve_gpu: ModuleType) -> None:
    work = serve_gpu.Work("tiny", adapters=2, clients=5, requests=4, prompt=2, output=3, rate=100.0)
    shares = [serve_gpu.Share(work, i, 2, seed=1) for i in range(2)]
    ordered = sorted(start_s for share in shares for starts_s in share.starts_s() for start_s in starts_s)
    assert len(ordered) == len(set(ordered)) == 20
    begun_s: list[float] = []

    async def never_ready(model: str, prompt: list[int]) -> AsyncIterator[list[int]]:
        begun_s.append(time.monotonic())
        await all_are_there.wait()
        yield [1]
        yield [2, 3]

    all_are_there = asyncio.Event()
    began_s = time.monotonic()
    clients = asyncio.gather(*(serve_gpu.be_clients(never_ready, share) for share in shares))
    async with asyncio.timeout(30):
        while len(begun_s) < 20:
            await asyncio.sleep(0.01)
    all_are_there.set()
    taken = await clients
    assert all(begun - began_s >= due for begun, due in zip(sorted(begun_s), ordered, strict=True))
    assert sum(each.num_tokens for each in taken) == 20 * 3
    assert sum(len(each.first_token_s) for each in taken) == 20
