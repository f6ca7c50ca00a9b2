"""Asks a running service from Python, without HTTP: `RAY_AUTH_MODE=token .venv/bin/python examples/handle.py`."""

import asyncio

import ray
from ray import serve

from lorafleet.workers.request import GenerateRequest


async def main() -> None:
    handle = serve.get_app_handle("lorafleet").options(stream=True)
    question = {"role": "user", "content": "What does the cat say?"}
    request = GenerateRequest(model="pirate", messages=(question,), temperature=0)
    async for delta in handle.generate.remote(request):
        print(delta.text, end="", flush=True)


ray.init(address="auto", log_to_driver=False)
asyncio.run(main())
