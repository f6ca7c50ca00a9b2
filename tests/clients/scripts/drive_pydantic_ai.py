"""pydantic-ai: agents with tools, outputs by tool and natively, streams; chats, Responses, Messages."""

import asyncio
import os
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

PROVIDER = OpenAIProvider(base_url=os.environ["BASE"] + "/v1", api_key="none")
ONE_CALL = {"parallel_tool_calls": False, "temperature": 0.7}
SKY = "What colour is the sky?"


class City(BaseModel):
    name: Literal["Oslo", "Rome"]
    size: int = Field(ge=1, le=9)


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """Tell the weather."""
    return f"Sun in {city}"


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model, settings = kind("shout", provider=PROVIDER), {"temperature": 0.0}
        assert (await Agent(model, model_settings=settings).run(SKY)).output == "THE SKY IS BLUE."
        async with Agent(model, model_settings=settings).run_stream(SKY) as stream:
            assert await stream.get_output() == "THE SKY IS BLUE."
        base = kind("demo", provider=PROVIDER)
        for output in (ToolOutput(City), NativeOutput(City), NativeOutput(City, strict=True)):
            result = await Agent(base, output_type=output, model_settings=ONE_CALL).run("Name a city")
            assert isinstance(result.output, City), (kind, output)
        # The model must call something each turn, the tool or the output; it stops by the output.
        agent = Agent(base, output_type=ToolOutput(City), tools=[weather], model_settings=ONE_CALL)
        result = await agent.run("Name a city", usage_limits=UsageLimits(request_limit=40))
        assert isinstance(result.output, City)
        async with Agent(base, output_type=ToolOutput(City), model_settings=ONE_CALL).run_stream(
            "Name a city"
        ) as stream:
            assert isinstance(await stream.get_output(), City)


asyncio.run(main())

from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider

claude = AnthropicModel("demo", provider=AnthropicProvider(base_url=os.environ["BASE"], api_key="none"))
assert isinstance(
    Agent(claude, output_type=ToolOutput(City), model_settings=ONE_CALL).run_sync("Name a city").output, City
)
print("ok")
