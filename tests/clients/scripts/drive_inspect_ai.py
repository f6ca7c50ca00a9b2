"""inspect_ai: its openai-api and vllm providers: tools, formats, logprobs, adapters by name and by path."""

import asyncio
import os
from pathlib import Path
from typing import Literal

os.environ["VLLM_BASE_URL"] = os.environ["BASE"] + "/v1"
os.environ["VLLM_API_KEY"] = "none"
os.environ["LORAFLEET_BASE_URL"] = os.environ["BASE"] + "/v1"
os.environ["LORAFLEET_API_KEY"] = "none"

import inspect_ai
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.scorer import exact
from inspect_ai.tool import ToolFunction, tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

SKY = "What colour is the sky?"


class Count(BaseModel):
    kind: Literal["a", "b"]
    sure: bool


@tool
def weather():
    async def execute(days: int) -> str:
        """Tell the weather.

        Args:
            days: How many days ahead.
        """
        return "Sun"

    return execute


async def main() -> None:
    for name in ("openai-api/lorafleet/demo", "vllm/demo"):
        model = get_model(name, config=GenerateConfig(temperature=0, max_tokens=64))
        assert (await model.generate(SKY)).completion == "The sky is blue."
        schema = ResponseSchema(name="count", json_schema=json_schema(Count), strict=True)
        made = await model.generate(SKY, config=GenerateConfig(response_schema=schema))
        Count.model_validate_json(made.completion)
        logged = await model.generate(SKY, config=GenerateConfig(logprobs=True, top_logprobs=2))
        assert len(logged.choices[0].logprobs.content) > 0
        called = await model.generate(SKY, tools=[weather()], tool_choice=ToolFunction("weather"))
        assert called.message.tool_calls[0].function == "weather"


asyncio.run(main())
task = inspect_ai.Task(dataset=[Sample(input=SKY, target="THE SKY IS BLUE.")], scorer=exact())
adapters = Path(os.environ["ADAPTERS"])
for name in ("openai-api/lorafleet/shout", "vllm/shout", f"vllm/demo:{adapters / 'shout'}"):
    [log] = inspect_ai.eval(task, model=name, temperature=0, display="none", log_dir="logs")
    assert log.status == "success", (name, log.error)
    assert [each.scores["exact"].value for each in log.samples] == ["C"], (name, log.samples[0].scores)
print("ok")
