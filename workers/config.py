"""Settings of one worker: the base model and the engine. Sizes are bytes, durations seconds."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


_MAX_BYTES = 2**63 - 1
MAX_ID_BYTES = 200
"""The id is the name of a folder, too."""


def parse_bytes(value: object) -> object:
    """`1GiB`, `512 MB` or a plain number of bytes. Raises ValueError on anything else, and on sizes that none has."""
    size = value
    if isinstance(value, str) and value != "auto":
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        size = 0.0 if match is None else float(match[1]) * _UNITS.get(match[2], 0)
        size = int(size) if size <= _MAX_BYTES else size
    if isinstance(size, bool) or (isinstance(size, int | float) and not 1 <= size <= _MAX_BYTES):
        raise ValueError(f"{str(value)[:40]!r} is not a size: write a number of bytes, at least 1, or, say, 512MiB")
    return size


def _whole(value: object) -> object:
    """A number that a command line gives as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
BytesOrAuto = Annotated[
    int | Literal["auto"], BeforeValidator(parse_bytes), Field(description="Bytes (`1GiB`, `512MB`) or `auto`.")
]


def _sharing(value: object) -> object:
    """YAML reads `off` as false, and the setting was a switch once."""
    return {"true": "shared", "false": "off"}.get(str(value).lower(), value)


PrefixSharing = Annotated[Literal["shared", "per_key", "off"], BeforeValidator(_sharing)]


class Settings(BaseModel):
    """Base of every settings model: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _usable_id(value: str) -> str:
    """Refuse ids that nobody could send or see, and those that make no folder of the store's state."""
    if not value.isprintable() or value != value.strip() or not value.strip(".") or len(value.encode()) > MAX_ID_BYTES:
        raise ValueError(
            f"an id has up to {MAX_ID_BYTES} bytes, all printable, without a space around them, and is more than dots"
        )
    return value


class ModelConfig(Settings):
    """The base model."""

    id: Annotated[str, AfterValidator(_usable_id)] = Field(
        min_length=1, description="Name of the base in requests and in GET /v1/models."
    )
    source: str = Field(
        min_length=1, description="Local folder or hub id of a decoder-only model that transformers loads."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="`auto` takes the checkpoint's dtype; float32 on a CPU."
    )
    quantization: Literal["none", "fp8"] = Field(
        default="none",
        description="`fp8` rounds the weights of linear layers to 8 bits while loading, and on a GPU multiplies them "
        "with activations rounded row by row: about 1.5 times as fast in half the memory. Adapters, embedding and head "
        "stay as they are. `none` serves what the checkpoint has. A GPU multiplies fp8 weights with a scale for each "
        "matrix or output as they are; other quantised weights are dequantised while loading.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Longest prompt plus answer, in tokens; default the model's own. Longrope and dynamic RoPE choose "
        "their frequencies by it, for all requests alike.",
    )
    tool_parser: Literal["hermes", "qwen", "llama3_json", "mistral", "deepseek", "harmony"] | None = Field(
        default=None,
        description="How the model writes tool calls; default the response template of its tokenizer, if it has one. "
        "`harmony` is gpt-oss', which has its reasoning too.",
    )
    reasoning_parser: Literal["think_tags"] | None = Field(
        default=None, description="How the model writes its reasoning: `think_tags` is <think>...</think>."
    )
    load: Literal["weights", "dummy"] = Field(
        default="weights", description="`dummy` makes random weights, for benchmarks."
    )


DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d{1,3})?)$"


class SpeculationConfig(Settings):
    """Guesses of tokens, made before the base computes them."""

    kind: Literal["ngram"] = Field(
        default="ngram", description="`ngram` guesses what followed the latest tokens when they last stood in the text."
    )
    tokens: int = Field(default=4, ge=1, le=16, description="Tokens guessed for each sequence in a step.")


class EngineConfig(Settings):
    """One worker's engine."""

    device: str = Field(
        default="auto",
        pattern=DEVICE_PATTERN,
        description="`auto` takes a GPU if there is one; else `cpu`, `cuda` or `cuda:N`.",
    )
    tensor_parallel_size: Annotated[Literal[1, 2, 4, 8], BeforeValidator(_whole)] = Field(
        default=1,
        description="Devices of one worker. Each holds a part of the base, of every adapter and of the KV pages: for a "
        "base that one GPU cannot hold, or to answer sooner. The worker is a group of so many processes on one node.",
    )
    max_batch_tokens: int = Field(
        default=2048,
        ge=1,
        le=2**20,
        description="Most tokens of one step, prefill and decode together. Where both are in a step, "
        "it has 1,024 unless prompts come faster than that, so that tokens come evenly.",
    )
    max_running: int = Field(default=64, ge=1, le=2**16, description="Most sequences in one step.")
    kv_bytes: BytesOrAuto = Field(default="auto", description="Memory for KV pages, on each device of a worker.")
    kv_page_tokens: int = Field(default=16, ge=1, le=2**16, description="Tokens in one KV page.")
    kv_dtype: Literal["auto", "fp8"] = Field(
        default="auto",
        description="`auto` keeps keys and values in the model's dtype. `fp8` rounds them to 8 bits, each head of each "
        "token at a scale of its own: about half the memory, and half the bytes of attention to long contexts. On a "
        "GPU it needs compute capability 8.9.",
    )
    latent_cache: Literal["auto", "compressed", "expanded"] = Field(
        default="auto",
        description="What pages keep for latent attention (DeepSeek's). `compressed` keeps the latent of each token, "
        "`expanded` the keys and values of all heads. `auto` compresses on one GPU, and expands on a CPU and on "
        "several devices. With the compressed cache `kv_dtype: fp8` is refused, as is activated LoRA on `kv_b_proj`.",
    )
    prefix_cache: PrefixSharing = Field(
        default="shared",
        description="Keep KV pages of finished requests for prompts that start alike: of all callers (`shared`), or of "
        "the same API key (`per_key`), so that nobody learns from `cached_tokens` or from timing what others ask. "
        "`off` keeps none. A base with recurrent layers has none, whatever is set.",
    )
    logits_chunk_tokens: int = Field(
        default=512,
        ge=1,
        le=2**20,
        description="Most tokens whose logits exist at once, which bounds the memory that a large vocabulary takes: a "
        "step that needs more makes them in several passes, and runs without a CUDA graph.",
    )
    max_wait_s: float = Field(
        default=1.0,
        gt=0,
        description="A waiting request older than this is not passed by others that take what it needs.",
    )
    speculation: SpeculationConfig | None = Field(
        default=None,
        description="Guess tokens and have one step confirm several, where few sequences run and their text repeats. "
        "Answers stay the same. Sequences with penalties or a grammar are not guessed for, nor with a base that has "
        "recurrent layers.",
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Share of the GPU that workers on it may take together, weights included."
    )
    stall_s: float = Field(
        default=30.0,
        gt=0,
        description="check_health fails when the step loop, or another rank, has stood still this long.",
    )


class PoolConfig(Settings):
    """A worker's adapter pool."""

    max_rank: int = Field(default=64, ge=1, le=512, description="Largest LoRA rank that is accepted.")
    pool_bytes: BytesOrAuto = Field(default="auto", description="Memory for adapter pages, on each device of a worker.")
    max_slots: int = Field(
        default=1024,
        ge=0,
        le=65536,
        description="Most adapters resident at once, per worker; 0: the base alone, without memory for adapters.",
    )
