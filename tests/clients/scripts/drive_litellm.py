"""litellm: its openai, hosted_vllm and anthropic providers: chats, streams, tools, formats, completions, embeddings."""

import json
import os

import litellm
from pydantic import BaseModel

URL = os.environ["BASE"] + "/v1"
SKY = [{"role": "user", "content": "What colour is the sky?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


class Found(BaseModel):
    sure: bool
    count: int


SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["sure", "count"],
    "additionalProperties": False,
}

for provider in ("openai", "hosted_vllm"):
    options = {"api_base": URL, "api_key": "none", "temperature": 0, "num_retries": 0}
    for name, answer in (("demo", "The sky is blue."), ("shout", "THE SKY IS BLUE.")):
        reply = litellm.completion(model=f"{provider}/{name}", messages=SKY, **options)
        assert reply.choices[0].message.content == answer, reply
        events = litellm.completion(
            model=f"{provider}/{name}", messages=SKY, stream=True, stream_options={"include_usage": True}, **options
        )
        chunks = list(events)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
        assert litellm.stream_chunk_builder(chunks).usage.completion_tokens > 0
    model = f"{provider}/demo"
    called = litellm.completion(
        model=model, messages=SKY, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **options
    )
    message = called.choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Oslo", "Rome")
    assert called.choices[0].finish_reason == "tool_calls"
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sun"}
    again = litellm.completion(model=model, messages=[*SKY, message, answer], tools=TOOLS, max_tokens=5, **options)
    assert again.choices[0].message is not None
    named = {"type": "function", "function": {"name": "weather"}}
    chunks = litellm.completion(model=model, messages=SKY, tools=TOOLS, tool_choice=named, stream=True, **options)
    whole = litellm.stream_chunk_builder(list(chunks))
    assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Oslo", "Rome")
    schema = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA, "strict": True}}
    made = litellm.completion(model=model, messages=SKY, response_format=schema, **options)
    Found.model_validate_json(made.choices[0].message.content)
    by_class = litellm.completion(model=model, messages=SKY, response_format=Found, max_tokens=64, **options)
    assert by_class.choices[0].message.content.startswith("{")

text = litellm.text_completion(
    model="text-completion-openai/demo", prompt="The sky is", max_tokens=4, api_base=URL, api_key="none", logprobs=1
)
assert text.choices[0].text
for provider in ("openai", "hosted_vllm"):
    found = litellm.embedding(model=f"{provider}/demo", input=["a", "b"], api_base=URL, api_key="none")
    assert len(found.data) == 2
reply = litellm.responses(
    model="openai/shout", input="What colour is the sky?", temperature=0, api_base=URL, api_key="none"
)
assert reply.output[0].content[0].text == "THE SKY IS BLUE."
claude = litellm.completion(
    model="anthropic/shout", messages=SKY, max_tokens=32, temperature=0, api_base=os.environ["BASE"], api_key="none"
)
assert claude.choices[0].message.content == "THE SKY IS BLUE."
print("ok")
