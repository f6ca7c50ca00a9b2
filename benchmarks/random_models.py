"""Bases and adapters of random weights, so that nothing is downloaded and no training has to be waited for."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights, ModuleManifest, ModuleShape
from lorafleet.workers.checkpoint import read_config
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.model.geometry import empty_model, read_geometry

GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        # Smaller than by default, where rounding 80 random layers to bfloat16 leaves the probe's tolerance.
        "initializer_range": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "qwen-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "initializer_range": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gemma3-27b": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
        "initializer_range": 0.01,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "vocab_size": 102400,
        "initializer_range": 0.01,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
_TINY: dict[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "n_routed_experts": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 32,
    "vocab_size": 512,
}
TINY_OF = {name: f"tiny-{name}" for name in ("qwen3-30b-a3b", "gemma3-27b", "deepseek-v2-lite")}
"""Geometry -> a tiny one of its kind."""
for _name, _tiny in TINY_OF.items():
    GEOMETRIES[_tiny] = {name: _TINY.get(name, value) for name, value in GEOMETRIES[_name].items()}
GEOMETRIES[TINY_OF["deepseek-v2-lite"]]["num_key_value_heads"] = 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_MODEL_LEN = 2048
SHARD_BYTES = 2 << 30

Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def device() -> str:
    """Return the device that makes random weights: a GPU is much faster."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_base(folder: Path, geometry: str, max_model_len: int = MAX_MODEL_LEN) -> Path:
    """A folder with the configuration of a base; its weights are made up when it is loaded with `load: dummy`."""
    fields = {"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-5, **GEOMETRIES[geometry]}
    kind = fields.pop("model_type")
    config = transformers.AutoConfig.for_model(
        kind,
        **fields,
        max_position_embeddings=max_model_len,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    return folder


def write_tokenizer(base: Path, geometry: str) -> None:
    """A tokenizer beside the configuration in `base`: all bytes, then made-up words, as many as the vocabulary has."""
    vocab_size, rng = GEOMETRIES[geometry]["vocab_size"], random.Random(0)
    words = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(words) < vocab_size - 1:
        word = "".join(rng.choices('abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789{}[]":,. ', k=rng.randint(2, 8)))
        words[word.replace(" ", "Ġ")] = None
    vocab = {word: number for number, word in enumerate([*words, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(base)


def write_weights(base: Path) -> None:
    """Random weights beside the configuration in `base`, in shards, as a hub would have them."""
    model = empty_model(read_config(ModelConfig(id="base", source=str(base))), torch.bfloat16)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    num_shards = 0

    def close() -> None:
        nonlocal num_shards
        name = f"model-{num_shards:05}.safetensors"
        save_file(shard, base / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        num_shards += 1
        shard.clear()

    for name, parameter in model.state_dict().items():
        if parameter.dim() == 1:
            shard[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            shard[name] = (torch.randn(parameter.shape, device=device()) * 0.02).bfloat16().cpu()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            close()
    if shard:
        close()
    if device() == "cuda":
        torch.cuda.empty_cache()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def kv_bytes(geometry: str, num_tokens: int) -> int:
    """Bytes that the keys and values of so many tokens take, in two bytes an element."""
    shape = GEOMETRIES[geometry]
    head_dim = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    if "kv_lora_rank" in shape:  # keys and values are as wide as the wider
        head_dim = max(shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"], shape["v_head_dim"])
    return int(4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * num_tokens)


class RandomAdapters:
    """Adapters in host memory. Versions of one rank share their bytes: content costs no time here."""

    def __init__(self, base: Path, targets: Sequence[str] = PROJECTIONS, embeddings: bool = False) -> None:
        geometry = read_geometry(ModelConfig(id="base", source=str(base), dtype="bfloat16"))
        wanted = (*targets, *(("embed_tokens", "lm_head") if embeddings else ()))
        self._modules = {n: s for n, s in geometry.modules.items() if n.rpartition(".")[2] in wanted}
        self._made: dict[int, AdapterWeights] = {}
        self.fetched_bytes = 0

    def fetch(self, version: str) -> AdapterWeights:
        """The weights of a version, which is called `name-r<rank>`."""
        rank = int(version.rpartition("-r")[2])
        made = self._of_rank(rank)
        self.fetched_bytes += made.manifest.num_bytes
        return replace(made, manifest=replace(made.manifest, version=version))

    def num_bytes(self, rank: int) -> int:
        """Of the weights of an adapter."""
        return sum(2 * rank * shape.num_experts * (shape.in_dim + shape.out_dim) for shape in self._modules.values())

    def _of_rank(self, rank: int) -> AdapterWeights:
        if rank not in self._made:
            manifest = AdapterManifest(
                version=f"r{rank}",
                rank=rank,
                targets=tuple(sorted({n.rpartition(".")[2] for n in self._modules})),
                modules=tuple(ModuleManifest(name, rank, 1.0) for name in self._modules),
                num_bytes=self.num_bytes(rank),
            )
            tensors = {name: _random_pair(shape, rank) for name, shape in self._modules.items()}
            self._made[rank] = AdapterWeights.of(manifest, "bfloat16", tensors)
        return self._made[rank]


def _random_pair(shape: ModuleShape, rank: int) -> Pair:
    num_rows = rank * shape.num_experts
    a_shape = (shape.in_dim, rank) if shape.kind == "embedding" else (num_rows, shape.in_dim)
    a = torch.randn(a_shape, device=device()) * shape.in_dim**-0.5
    b = torch.randn((num_rows, shape.out_dim), device=device()) * 0.01
    first, second = (t.bfloat16().view(torch.uint16).cpu().numpy() for t in (a, b))
    return first, second


def write_adapter(folder: Path, base: Path, rank: int, seed: int = 0) -> Path:
    """An adapter in PEFT's files, on all projections."""
    geometry = read_geometry(ModelConfig(id="base", source=str(base), dtype="bfloat16"))
    generator = torch.Generator(device()).manual_seed(seed)

    def randn(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device()) * scale).bfloat16().cpu()

    tensors = {}
    for name, shape in geometry.modules.items():
        if name.rpartition(".")[2] in PROJECTIONS:
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = randn(rank, shape.in_dim, scale=shape.in_dim**-0.5)
            tensors[f"{prefix}.lora_B.weight"] = randn(shape.out_dim, rank, scale=0.01)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"base_model_name_or_path": "base", "target_modules": list(PROJECTIONS), "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
