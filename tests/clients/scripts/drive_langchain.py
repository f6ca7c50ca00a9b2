"""langchain-openai: chats, streams, tools in an agent's loop, structured output in its three methods, embeddings."""

import os
from typing import Literal

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

URL = os.environ["BASE"] + "/v1"
OPTIONS = {"base_url": URL, "api_key": "none", "max_retries": 0}
SKY = "What colour is the sky?"


class City(BaseModel):
    """A city."""

    name: Literal["Oslo", "Rome"]
    size: int = Field(ge=1, le=9)


@tool
def weather(city: Literal["Oslo", "Rome"], days: Literal[1, 2, 3]) -> str:
    """Tells the weather."""
    return f"Sun in {city} for {days} days."


base = ChatOpenAI(model="demo", temperature=0, **OPTIONS)
shout = ChatOpenAI(model="shout", temperature=0, **OPTIONS)
assert base.invoke(SKY).content == "The sky is blue."
assert shout.invoke(SKY).content == "THE SKY IS BLUE."
assert [reply.content for reply in shout.batch([SKY, SKY])] == ["THE SKY IS BLUE."] * 2

whole = AIMessageChunk(content="")
for chunk in shout.stream(SKY, stream_usage=True):
    whole += chunk
assert whole.content == "THE SKY IS BLUE."
assert whole.usage_metadata["output_tokens"] > 0

logged = ChatOpenAI(model="demo", temperature=0, logprobs=True, top_logprobs=2, **OPTIONS).invoke(SKY)
assert len(logged.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
assert OpenAI(model="demo", max_tokens=4, temperature=0, **OPTIONS).invoke("The sky is").strip()

for method in ("json_schema", "function_calling"):
    for strict in (None, True):
        made = base.with_structured_output(City, method=method, strict=strict).invoke("Name a city")
        assert isinstance(made, City), (method, strict, made)
loose = base.bind(max_tokens=64).with_structured_output(
    {"title": "any", "type": "object"}, method="json_mode", include_raw=True
)
assert loose.invoke("Say JSON")["raw"].content.startswith("{")

asks = base.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
called = asks.invoke(SKY)
[call] = called.tool_calls
assert call["name"] == "weather"
assert call["args"]["city"] in ("Oslo", "Rome")
history = [HumanMessage(SKY), called, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
assert base.bind_tools([weather]).bind(max_tokens=8).invoke(history).content
streamed = AIMessageChunk(content="")
for chunk in base.bind_tools([weather], tool_choice="weather", strict=True).stream(SKY):
    streamed += chunk
assert streamed.tool_calls[0]["args"]["days"] in (1, 2, 3)

responses = ChatOpenAI(model="shout", temperature=0, use_responses_api=True, **OPTIONS)
assert responses.invoke(SKY).text == "THE SKY IS BLUE."
assert "".join(chunk.text for chunk in responses.stream(SKY)) == "THE SKY IS BLUE."

vectors = OpenAIEmbeddings(model="demo", check_embedding_ctx_length=False, **OPTIONS).embed_documents(["a", "b"])
assert len(vectors) == 2
assert len(vectors[0]) > 8

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy

for strategy in (ProviderStrategy, ToolStrategy):
    one_call = ChatOpenAI(model="demo", temperature=0, extra_body={"parallel_tool_calls": False}, **OPTIONS)
    agent = create_agent(one_call if strategy is ToolStrategy else base, tools=[], response_format=strategy(City))
    assert isinstance(agent.invoke({"messages": [HumanMessage("Name a city")]})["structured_response"], City)
print("ok")
