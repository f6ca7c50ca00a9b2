"""Compiles every kernel for a Hopper GPU where there is none; run in a process of its own, without the interpreter.

Prints a line of JSON: kernel -> bytes of shared memory that its largest variant takes.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from lorafleet.kernels import (
    attention,
    attention_triton,
    embedding_triton,
    expand_triton,
    fused_triton,
    grouped_triton,
    head_lora_triton,
    kv_place_triton,
    latent,
    latent_triton,
    routing_triton,
    row_copy_triton,
    shrink_triton,
)
from lorafleet.kernels.attention import DecodeWorkspace
from lorafleet.kernels.kv_place import HeadNorm, KVPlace, Rotation
from lorafleet.kernels.launching import compiled_ahead
from lorafleet.kernels.norms import Activation, Branch, Norm, NormRule
from lorafleet.kernels.segments import build_segments
from lorafleet.kernels.weights import HeadColumns
from tests.kernels.paged import paged_embedding, paged_linear

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
MAX_SHARED_BYTES = 232_448
"""What a program may have on a Hopper GPU."""
KERNELS = {
    "shrink": shrink_triton._shrink_kernel,
    "expand": expand_triton._expand_kernel,
    "lookup": embedding_triton._lookup_kernel,
    "decode": attention_triton.decode_kernel,
    "extend": attention_triton.extend_kernel,
    "rms_norm": fused_triton._rms_norm_kernel,
    "rotate_and_store": kv_place_triton._rotate_and_store_kernel,
    "store": kv_place_triton._store_kernel,
    "gated": fused_triton._gated_kernel,
    "copy_rows": row_copy_triton._copy_rows_kernel,
    "product": grouped_triton._product_kernel,
    "order": routing_triton._order_kernel,
    "count": routing_triton._count_kernel,
    "place": routing_triton._place_kernel,
    "spread": routing_triton._spread_kernel,
    "segments": routing_triton._segments_kernel,
    "combine": routing_triton._combine_kernel,
    "head_lora": head_lora_triton._head_lora_kernel,
    "latent_store": latent_triton.store_kernel,
    "latent_decode": latent_triton.decode_kernel,
    "latent_combine": latent_triton.combine_kernel,
    "latent_extend": latent_triton.extend_kernel,
}


class Hopper:
    """What Triton asks of a driver before it launches anything."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": MAX_SHARED_BYTES})

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_each() -> None:
    """Every launcher once, on small arguments."""
    rng = np.random.default_rng(0)
    for chunk_length in (16, 128):
        linear = paged_linear(rng, in_dim=64, widths=(64, 32, 32), ranks=[[8, 8, 8]], dtype=DTYPE, device=CPU)
        segments = build_segments(np.zeros(4, np.int32), device=CPU, chunk_length=chunk_length)
        h = shrink_triton.shrink(torch.zeros(4, 64, dtype=DTYPE), linear.weights, segments)
        expand_triton.expand(h, linear.weights, segments, torch.zeros(4, 128, dtype=DTYPE), accumulate=False)
    table = paged_embedding(rng, num_embeddings=50, width=32, ranks=[8], page_elements=320, dtype=DTYPE, device=CPU)
    embedding_triton.lookup(torch.zeros(4, dtype=torch.int32), table.weights, segments)

    keys, values = torch.zeros(2, 8, 2, 16, 64, dtype=DTYPE)
    query, out = torch.zeros(2, 4, 8, 64, dtype=DTYPE)
    workspace = DecodeWorkspace.allocate(num_heads=8, num_kv_heads=2, head_dim=64, device=CPU, num_processors=132)
    tables, lengths = torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    attention.decode(query, keys, values, tables, lengths, out, workspace, scaling=0.1)
    starts = torch.arange(5, dtype=torch.int32)
    attention.extend(query, keys, values, tables, lengths, starts, out, scaling=0.1)

    bias = torch.zeros(8, 48)
    attention.decode(query, keys, values, tables, lengths, out, workspace, scaling=0.1, key_bias=bias)
    attention.extend(query, keys, values, tables, lengths, starts, out, scaling=0.1, key_bias=bias)

    sinks = torch.zeros(8, dtype=DTYPE)
    for head_dim in (64, 512):
        keys, values = torch.zeros(2, 8, 2, 16, head_dim, dtype=DTYPE)
        query, out = torch.zeros(2, 4, 8, head_dim, dtype=DTYPE)
        workspace = DecodeWorkspace.allocate(
            num_heads=8, num_kv_heads=2, head_dim=head_dim, device=CPU, num_processors=132
        )
        attention.decode(
            query, keys, values, tables, lengths, out, workspace, scaling=0.1, window=40, softcap=9.0, sinks=sinks
        )
        attention.extend(
            query, keys, values, tables, lengths, starts, out, scaling=0.1, window=40, softcap=9.0, sinks=sinks
        )

    keys, values = torch.zeros(2, 8, 2, 16, 64, dtype=DTYPE)
    place = KVPlace(keys, values, *torch.zeros(2, 4, dtype=torch.int32))
    weight = torch.zeros(64, dtype=DTYPE)
    rotation = torch.zeros(4, 64, dtype=DTYPE)
    norms = [Norm(weight, NormRule(1e-5, *others)) for others in ((), (1.0, True), (0.0, True, True))]
    qkv, angles = torch.zeros(4, 12 * 64, dtype=DTYPE), (rotation, rotation)
    for each, pairs in zip(norms, (Rotation(64), Rotation(32, is_interleaved=True), Rotation(0)), strict=True):
        kv_place_triton.rotate_and_store(qkv, angles, place, pairs, HeadNorm(each, each))
    kv_place_triton.store(torch.zeros(4, 2, 64, dtype=DTYPE), torch.zeros(4, 2, 64, dtype=DTYPE), place)
    for each in norms:
        fused_triton.rms_norm(rotation, norms[0], rotation.clone(), None, Branch(each, 0.5))
        fused_triton.rms_norm(rotation, each, rotation.clone())
    fused_triton.add(rotation, rotation.clone(), None, Branch(norms[0]))
    activations: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
    for activation in activations:
        fused_triton.gated(torch.zeros(4, 128, dtype=DTYPE), activation)

    for dtype, head_dim in ((DTYPE, 128), (torch.float16, 128), (DTYPE, 512)):
        launch_in_fp8(dtype, head_dim, tables, lengths, starts)
    launch_on_latents(tables, lengths, starts)
    experts = torch.zeros(64, 8, dtype=torch.int64)
    for slots in (None, torch.zeros(64, dtype=torch.int32)):
        _, _, places, _, keys, routed_slots = routing_triton.order(experts, 128, slots, 128)
        if keys is not None and routed_slots is not None:
            routing_triton.segments(keys, routed_slots, 16, 512)
    routing_triton.order_of_experts(experts, 128)
    routing_triton.spread(torch.zeros(64, 256, dtype=DTYPE), 8, places)
    for num_rows in (32, 64, 128):  # of 4 matrices
        ends = torch.zeros(4, dtype=torch.int32)
        grouped_triton.product(torch.zeros(num_rows, 64, dtype=DTYPE), torch.zeros(4, 64, 32, dtype=DTYPE), ends)
    outputs = torch.zeros(512, 64, dtype=DTYPE)
    routing_triton.combine(outputs, experts, experts.to(DTYPE), places, 128, outputs[:64])

    rows = torch.zeros(3, 5, dtype=torch.int64)
    for is_aligned in (True, False):
        for part in (rows, rows[:, :1], rows[:, 1:]):
            row_copy_triton.copy_rows(weight, rotation.view(-1), part, is_aligned=is_aligned)


def launch_in_fp8(dtype: torch.dtype, head_dim: int, tables: Tensor, lengths: Tensor, starts: Tensor) -> None:
    """What reads and writes keys and values in fp8."""
    keys, values = torch.zeros(2, 8, 2, 16, head_dim).to(torch.float8_e4m3fn)
    scales = torch.zeros(2, 8, 2, 16)
    query, out = torch.zeros(2, 4, 8, head_dim, dtype=dtype)
    workspace = DecodeWorkspace.allocate(num_heads=8, num_kv_heads=2, head_dim=head_dim, device=CPU, num_processors=132)
    how: dict[str, Any] = {"scaling": 0.1, "key_scales": scales[0], "value_scales": scales[1]}
    attention.decode(query, keys, values, tables, lengths, out, workspace, **how)
    attention.extend(query, keys, values, tables, lengths, starts, out, **how)
    pages = torch.zeros(4, dtype=torch.int32)
    place = KVPlace(keys, values, pages, pages, scales[0], scales[1])
    angles = torch.zeros(4, head_dim, dtype=dtype)
    for rotation in (Rotation(head_dim), Rotation(32, is_interleaved=True)):
        qkv = torch.zeros(4, 12 * head_dim, dtype=dtype)
        kv_place_triton.rotate_and_store(qkv, (angles, angles), place, rotation, None)
    rows = torch.zeros(4, 2, head_dim, dtype=dtype)
    kv_place_triton.store(rows, rows, place)


def launch_on_latents(tables: Tensor, lengths: Tensor, starts: Tensor) -> None:
    """Attention to latents of DeepSeek's widths, with 16 heads and with 128, and LoRA on what is absorbed."""
    keys = torch.zeros(8, 1, 16, 576, dtype=DTYPE)
    weights = paged_linear(
        np.random.default_rng(0), in_dim=512, widths=(4096,), ranks=[[8]], dtype=DTYPE, device=CPU, max_rank=64
    ).weights
    for heads, chunk_length in ((16, 16), (128, 128)):
        query, turned, values = (torch.zeros(4, heads, width, dtype=DTYPE) for width in (512, 64, 128))
        workspace = latent.LatentWorkspace.allocate(num_heads=heads, rank=512, device=CPU, num_processors=132)
        latent.decode(query, turned, keys, tables, lengths, query, workspace, scaling=0.1)
        latent.extend(query, turned, keys, tables, lengths, starts, query, scaling=0.1)
        segments = build_segments(np.zeros(4, np.int32), device=CPU, chunk_length=chunk_length)
        for x, y, first in ((values, query, 0), (query, values, 128)):
            columns = HeadColumns(first, 256, 128)
            head_lora_triton.add(x, weights, segments, y, columns, is_absorbed=first == 0)
    cos, sin = torch.view_as_real(torch.zeros(4, 32, dtype=torch.complex64)).unbind(-1)
    for angles in (None, SimpleNamespace(cos=cos, sin=sin, is_interleaved=True)):
        latent.store(query[:, 0], turned[:, 0], keys, lengths, lengths, turned, angles)


def variants(kernel: Any) -> list[Any]:
    """What has been compiled of a kernel."""
    return list(kernel.device_caches[0][0].values())


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    for module in (attention, fused_triton, embedding_triton, expand_triton, kv_place_triton, latent, shrink_triton):
        module.dependent_launch = lambda tensor: True  # type: ignore[attr-defined]
    with compiled_ahead(2):
        launch_each()
    compiled = {name: variants(kernel) for name, kernel in KERNELS.items()}
    with compiled_ahead(2):
        launch_each()
    assert len(compiled["copy_rows"]) == 2, "one for rows that are aligned, and one for the others"
    assert compiled == {name: variants(kernel) for name, kernel in KERNELS.items()}, "something was compiled twice"
    print(json.dumps({name: max(each.metadata.shared for each in found) for name, found in compiled.items()}))


if __name__ == "__main__":
    main()
