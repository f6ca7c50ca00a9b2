"""Asks models by the stock OpenAI client, streaming, and keeps what a table needs to know of the answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import openai


@dataclass(slots=True)
class Answer:
    """An answer, while it streams and after."""

    model: str
    question: str
    text: str = ""
    num_tokens: int = 0
    worker_id: str = ""
    version: str | None = None
    """The adapter version that spoke; None: the base."""
    first_token_s: float = 0.0
    """From the request to the first text."""
    tokens_per_s: float = 0.0
    """After the first token; 0 for answers of one token."""
    finish_reason: str | None = None
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)


async def ask(client: openai.AsyncOpenAI, answer: Answer) -> Answer:
    """Stream the greedy answer of `answer.model` to `answer.question` into `answer`."""
    start = time.perf_counter()
    first = last = start
    try:
        stream = await client.chat.completions.create(
            model=answer.model,
            messages=[{"role": "user", "content": answer.question}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            served_by: dict[str, Any] | None = (chunk.model_extra or {}).get("lorafleet")
            if served_by:
                answer.worker_id, answer.version = served_by["worker_id"], served_by["version"]
            if chunk.usage is not None:
                answer.num_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                last = time.perf_counter()
                if choice.delta.content and not answer.text:
                    first = last
                    answer.has_begun.set()
                answer.text += choice.delta.content or ""
                answer.finish_reason = choice.finish_reason or answer.finish_reason
    finally:
        answer.has_begun.set()  # whoever waits for a stream that failed finds out from its task
    answer.first_token_s = first - start
    if last > first:
        answer.tokens_per_s = (answer.num_tokens - 1) / (last - first)
    return answer
