"""A worker of two processes on this machine's CPU, without Ray: `.venv/bin/python examples/group.py`."""

import asyncio
from pathlib import Path

from lorafleet.adapter_store.base_weights import CheckpointWeights
from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.workers.checkpoint import load_tokenizer
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.model.geometry import read_geometry
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.worker import Worker

DEMO = Path(__file__).parent / "demo"
BASE = DEMO / "base"
QUESTION = [{"role": "user", "content": "What does the cat say?"}]


async def main() -> None:
    model, pool = ModelConfig(id="demo", source=str(BASE)), PoolConfig()
    reader = AdapterReader(read_geometry(model, "cpu"), pool.max_rank, CheckpointWeights(BASE))
    read = [reader.read(DEMO / "adapters" / name) for name in ("shout", "pirate")]
    weights = {each.manifest.version: each for each in read}

    async def fetch(version: str) -> AdapterWeights:
        return weights[version]

    engine = EngineConfig(device="cpu", tensor_parallel_size=2)
    worker = Worker(worker_id="w", model=model, engine=engine, pool=pool, fetch=fetch)
    try:
        for rank in (await worker.state()).ranks:
            print(f"rank {rank.rank}: process {rank.pid} on {rank.device}")
        prompt = load_tokenizer(str(BASE)).apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
        for number, version in enumerate((None, *weights)):
            request = EngineRequest(f"r{number}", version, tuple(prompt), SamplingParams(temperature=0, max_tokens=40))
            print("".join([delta.text async for delta in worker.generate(request)]))
    finally:
        worker.close()


if __name__ == "__main__":
    asyncio.run(main())
