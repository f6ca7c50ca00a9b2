"""Bases of several sizes, and random adapters for them, as numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorafleet.adapter_store.manifest import (
    NUMPY_DTYPES,
    AdapterManifest,
    AdapterWeights,
    Array,
    BaseGeometry,
    Dtype,
    ExtraManifest,
    ModuleManifest,
    ModuleShape,
)

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
ATTENTION = (*QKV, "o_proj")
LAYER = (*ATTENTION, *GATE_UP, "down_proj")
EVERYTHING = (*LAYER, "embed_tokens", "lm_head")
NORMS = ("model.layers.0.norm_in.weight", "model.norm.weight")
BIASES = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head")
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


def decoder(*, layers: int, hidden: int, inner: int, kv: int, vocab: int, dtype: Dtype = "bfloat16") -> BaseGeometry:
    """A Llama-like decoder."""
    modules = {"model.embed_tokens": ModuleShape("embedding", vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, in_dim, out_dim in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, kv),
            ("self_attn.v_proj", hidden, kv),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ]:
            modules[f"{prefix}.{name}"] = ModuleShape("linear", in_dim, out_dim)
    modules["lm_head"] = ModuleShape("linear", hidden, vocab)
    norms = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in ("norm_in", "norm_out")]
    return BaseGeometry(modules, dtype, {f"{name}.weight": hidden for name in [*norms, "model.norm"]})


GEOMETRIES = {
    "llama_8b": decoder(layers=32, hidden=4096, inner=14336, kv=1024, vocab=128256),
    "llama_7b": decoder(layers=32, hidden=4096, inner=11008, kv=4096, vocab=32000),
    "llama_1b": decoder(layers=16, hidden=2048, inner=8192, kv=512, vocab=128256),
    "qwen_05b": decoder(layers=24, hidden=896, inner=4864, kv=128, vocab=151936),
    "demo": decoder(layers=4, hidden=128, inner=512, kv=64, vocab=1024),
    "demo_344": decoder(layers=4, hidden=128, inner=344, kv=128, vocab=1024),
}

TINY = decoder(layers=2, hidden=32, inner=48, kv=16, vocab=200, dtype="float32")
"""Its vocabulary is wider than a page."""
ODD = decoder(layers=2, hidden=36, inner=52, kv=12, vocab=203, dtype="float16")
"""No width is a multiple of the alignment."""


def groups_of(geometry: BaseGeometry) -> list[tuple[str, ...]]:
    """q/k/v and gate/up of every layer."""
    prefixes = sorted({name.rpartition(".self_attn")[0] for name in geometry.modules if ".self_attn" in name})
    return [
        tuple(f"{prefix}.{block}.{name}" for name in names)
        for prefix in prefixes
        for block, names in (("self_attn", QKV), ("mlp", GATE_UP))
    ]


def extra_of(geometry: BaseGeometry, name: str) -> ExtraManifest:
    """What replaces the norm or matrix of that name, or is added to the output of that module, or scales it."""
    if name in geometry.modules:
        return ExtraManifest(name, "added", 1, geometry.modules[name].out_dim)
    if name.endswith(".lora_magnitude_vector"):
        return ExtraManifest(name, "magnitude", 1, geometry.modules[name.rpartition(".")[0]].out_dim)
    if name in geometry.vectors:
        return ExtraManifest(name, "replaced", 1, geometry.vectors[name])
    shape = geometry.modules[name.removesuffix(".weight")]
    rows, width = (shape.out_dim, shape.in_dim) if shape.kind == "linear" else (shape.in_dim, shape.out_dim)
    return ExtraManifest(name, "replaced", rows, width)


def manifest_of(
    geometry: BaseGeometry,
    version: str,
    rank: int,
    targets: Sequence[str],
    ranks: dict[str, int] | None = None,
    extras: Sequence[str] = (),
) -> AdapterManifest:
    """`ranks` replaces the rank of the modules it names; `extras` are as in `extra_of`."""
    names = [name for name in geometry.modules if name.rpartition(".")[2] in targets]
    modules = tuple(
        ModuleManifest(name, (ranks or {}).get(name, rank), scaling=0.5 + index) for index, name in enumerate(names)
    )
    elements = sum(m.rank * (geometry.modules[m.name].in_dim + geometry.modules[m.name].out_dim) for m in modules)
    found = tuple(extra_of(geometry, name) for name in sorted(extras))
    elements += sum(extra.num_rows * extra.width for extra in found)
    num_bytes = elements * np.dtype(NUMPY_DTYPES[geometry.dtype]).itemsize
    largest = max((module.rank for module in modules), default=0)
    return AdapterManifest(version, largest, tuple(sorted(targets)), modules, num_bytes, found)


def weights_of(geometry: BaseGeometry, manifest: AdapterManifest, seed: int = 0) -> AdapterWeights:
    """Random values, each a different one as far as the dtype allows, and none zero."""
    rng = np.random.default_rng(seed)

    def array(rows: int, columns: int) -> Array:
        # bfloat16 travels as bits: small normal numbers.
        if geometry.dtype == "bfloat16":
            made: Array = rng.integers(0x3000, 0x4000, (rows, columns), dtype=np.uint16)
        else:
            made = rng.standard_normal((rows, columns)).astype(NUMPY_DTYPES[geometry.dtype])
        return made

    tensors = {}
    for module in manifest.modules:
        shape = geometry.modules[module.name]
        a = array(shape.in_dim, module.rank) if shape.kind == "embedding" else array(module.rank, shape.in_dim)
        tensors[module.name] = (a, array(module.rank, shape.out_dim))
    extras = {extra.name: array(extra.num_rows, extra.width) for extra in manifest.extras}
    return AdapterWeights.of(manifest, geometry.dtype, tensors, extras)
