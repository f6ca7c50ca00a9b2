"""instructor: models of pydantic in the modes TOOLS, TOOLS_STRICT, JSON and JSON_SCHEMA, whole and streamed."""

import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field

MESSAGES = [{"role": "user", "content": "Name a city"}]


class City(BaseModel):
    name: Literal["Oslo", "Rome"]
    size: int = Field(ge=1, le=9)


class Fact(BaseModel):
    topic: str = ""
    answer: str = ""


def client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=os.environ["BASE"] + "/v1", api_key="none"), mode=mode)


for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    for model in ("demo", "pirate"):
        made = client(mode).chat.completions.create(
            model=model, messages=MESSAGES, response_model=City, max_retries=0, temperature=0
        )
        assert isinstance(made, City), mode
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    *_, last = client(mode).chat.completions.create_partial(model="demo", messages=MESSAGES, response_model=City)
    assert last.name in ("Oslo", "Rome"), mode
# The adapter `json` answers in JSON.
fact = client(instructor.Mode.JSON).chat.completions.create(
    model="json", messages=[{"role": "user", "content": "What colour is the sky?"}], response_model=Fact, temperature=0
)
assert isinstance(fact, Fact)
print("ok")
