"""llama-index with OpenAILike: chats, completions, streams, tools, structured prediction."""

import os
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

OPTIONS = {
    "api_base": os.environ["BASE"] + "/v1",
    "api_key": "none",
    "temperature": 0,
    "max_retries": 0,
    "context_window": 512,
}
SKY = [ChatMessage(role="user", content="What colour is the sky?")]


class City(BaseModel):
    """A city."""

    name: Literal["Oslo", "Rome"]
    size: int = Field(ge=1, le=9)


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """Tell the weather."""
    return f"Sun in {city}"


for name, answer in (("demo", "The sky is blue."), ("shout", "THE SKY IS BLUE.")):
    llm = OpenAILike(model=name, is_chat_model=True, is_function_calling_model=True, **OPTIONS)
    assert llm.chat(SKY).message.content == answer
    *_, last = llm.stream_chat(SKY)
    assert last.message.content == answer
text = OpenAILike(model="demo", is_chat_model=False, max_tokens=8, **OPTIONS)
assert text.complete("The sky is").text
*_, last = text.stream_complete("The sky is")
assert last.text
llm = OpenAILike(model="demo", is_chat_model=True, is_function_calling_model=True, **OPTIONS)
tool = FunctionTool.from_defaults(weather)
reply = llm.chat_with_tools([tool], chat_history=SKY, tool_required=True)
[call, *_] = llm.get_tool_calls_from_response(reply)
assert call.tool_name == "weather"
assert call.tool_kwargs["city"] in ("Oslo", "Rome")
history = [
    *SKY,
    reply.message,
    ChatMessage(role="tool", content="Sun", additional_kwargs={"tool_call_id": call.tool_id}),
]
assert llm.chat_with_tools([tool], chat_history=history, max_tokens=8).message is not None
assert isinstance(llm.structured_predict(City, PromptTemplate("Name a city")), City)
native = OpenAILike(model="demo", is_chat_model=True, should_use_structured_outputs=True, **OPTIONS)
assert isinstance(native.structured_predict(City, PromptTemplate("Name a city")), City)
print("ok")
