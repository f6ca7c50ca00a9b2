"""POST /v1/embeddings: prompts go through the engine as any do, and their hidden states come back."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, ConfigDict, Field

from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.description import body_of, replies
from lorafleet.cluster.http.guards import client_router
from lorafleet.cluster.http.sse import ClientGone, while_connected
from lorafleet.cluster.openai.answering import CLIENT_CLOSED_REQUEST, answer_errors
from lorafleet.cluster.openai.requests import MAX_PROMPTS, PromptShapes, parsed, prompts_of, request_of
from lorafleet.cluster.openai.writing import written
from lorafleet.cluster.serving.dispatch import Dispatcher, PreparedRequest
from lorafleet.cluster.validation import Incoming
from lorafleet.workers.config import Settings
from lorafleet.workers.request import GenerateRequest, NumKept, Pooling

"""Most prompts of one body, as with OpenAI."""
AT_ONCE = 32
"""How many of them are sent to the workers at a time."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "truncation_side": ("left",),
}
"""vLLM's fields that have no effect here, and their values without one."""

Vector = npt.NDArray[np.float32]


class EmbeddingsBody(Incoming):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="A base id, an adapter name, or base:adapter.")
    input: Annotated[
        tuple[str | tuple[int, ...], ...], BeforeValidator(prompts_of, json_schema_input_type=PromptShapes)
    ] = Field(
        max_length=MAX_PROMPTS, description="A text, a list of texts, a list of token ids, or a list of such lists."
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="`base64`: of little-endian float32."
    )
    dimensions: int | None = Field(default=None, ge=1, description="Keep only so many numbers, the first ones.")
    pooling: Pooling = Field(
        default="last", description="The hidden state of the last token, or the mean of all tokens'."
    )
    normalize: bool = Field(default=True, description="Scale each embedding to length 1, behind `dimensions`.")
    add_special_tokens: bool = Field(default=True, description="Put the tokenizer's own tokens around the text.")
    truncate_prompt_tokens: NumKept | None = Field(
        default=None, description="Keep only so many tokens of each prompt, the last ones; -1: as many as fit."
    )
    lora_path: str | None = Field(default=None, description="As SGLang has it: the adapter's name.")
    user: str | None = Field(default=None, description="Accepted, without an effect; so is the next.")
    request_id: str | None = None

    def requests(self) -> list[GenerateRequest]:
        """One request for each prompt. Raises BadRequest."""
        return [
            request_of(
                model=self.model,
                prompt=prompt,
                pooling=self.pooling,
                add_special_tokens=self.add_special_tokens,
                truncate_prompt_tokens=self.truncate_prompt_tokens,
                lora_path=self.lora_path,
            )
            for prompt in self.input
        ]

    def encoded(self, embedding: bytes) -> list[float] | str:
        """An embedding as the reply has it. Raises BadRequest where it has fewer than `dimensions` numbers."""
        vector: Vector = np.frombuffer(embedding, "<f4")
        if self.dimensions is not None:
            if self.dimensions > len(vector):
                raise BadRequest(f"dimensions={self.dimensions} is over the base's {len(vector)}", "dimensions")
            vector = vector[: self.dimensions]
        if self.normalize:
            length = np.linalg.norm(vector.astype(np.float64))
            vector = (vector / length).astype(np.float32) if length else vector
        if self.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return [float(value) for value in vector]


class Embedding(Settings):
    """One prompt's."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(Settings):
    """Tokens of all prompts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Settings):
    """All prompts', in their order."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingsUsage


def build_router(dispatcher: Dispatcher, keys: Keys) -> APIRouter:
    """The route."""
    router = client_router(keys)

    @router.post(
        "/embeddings",
        summary="Hidden states of prompts, pooled",
        openapi_extra=body_of(EmbeddingsBody, NEUTRAL),
        responses=replies(Embeddings) | answer_errors(),
    )
    async def embed(request: Request) -> Response:
        body = await parsed(EmbeddingsBody, request, dispatcher.prompts.threads, NEUTRAL)
        caller = request.state.caller
        prepared = [await dispatcher.prepare(each, caller=caller, param="input") for each in body.requests()]
        try:
            found = await while_connected(request.receive, _embedded(dispatcher, prepared))
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        num_tokens = sum(len(each.prompt_token_ids) for each in prepared)

        def reply() -> bytes:
            data: list[dict[str, Any]] = [
                {"object": "embedding", "index": index, "embedding": body.encoded(embedding)}
                for index, embedding in enumerate(found)
            ]
            usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            return written({"object": "list", "model": body.model, "data": data, "usage": usage})

        return Response(await asyncio.to_thread(reply), media_type="application/json")

    return router


async def _embedded(dispatcher: Dispatcher, prepared: list[PreparedRequest]) -> list[bytes]:
    """The embedding of each request, in their order."""
    found: list[bytes] = []
    for first in range(0, len(prepared), AT_ONCE):
        some = prepared[first : first + AT_ONCE]
        embeddings: dict[int, bytes] = {}
        async with aclosing(dispatcher.stream(some, is_whole=True)) as deltas:
            async for delta in deltas:
                if delta.embedding is not None:
                    embeddings[delta.index] = delta.embedding
        found += [embeddings[index] for index in range(len(some))]
    return found
