"""The LoRA kernels of other servers as contenders of `csgmv.py`, imported from unpacked wheels.

What they import of their servers is stood in for by empty modules; nothing of theirs is kept here. The folder given
holds what the wheels hold under `sglang/kernels/ops/lora/dense` and `vllm/lora/ops/triton_ops`.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class DenseCase:
    """A case as they take it: adapters in dense stacks, padded to the largest rank."""

    in_dim: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    row_slots: torch.Tensor
    """(rows,) int64, on the host."""
    x: torch.Tensor
    y: torch.Tensor
    num_sets: int

    @property
    def max_rank(self) -> int:
        return max(self.ranks)


Call = Callable[[int], object]
Contender = Callable[[DenseCase], Call]


def contenders(folder: Path) -> dict[str, Contender]:
    """Name -> contender, of those whose kernels lie in the folder."""
    found: dict[str, Contender] = {}
    if (folder / "sglang").is_dir():
        _import_sglang(folder)
        found["sglang16"] = lambda case: _sglang(case, 16)
        found["sglang128"] = lambda case: _sglang(case, 128)
    if (folder / "vllm").is_dir():
        _import_vllm(folder)
        found["vllm"] = _vllm
    return found


def sglang_embedding(token_ids: torch.Tensor, a: Sequence[torch.Tensor], row_slots: torch.Tensor, chunk: int) -> Call:
    """The embedding's A of SGLang: `a` are (slots, rank, vocabulary)."""
    kernel = importlib.import_module("sglang.kernels.ops.lora.dense.chunked_embedding_lora_a")
    info = _SglangInfo.of(row_slots, [a[0].shape[1]] * a[0].shape[0], chunk)
    return lambda i: kernel.chunked_embedding_lora_a_forward(token_ids, a[i], info, a[0].shape[2])


def _stub(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def _package(name: str, folder: Path) -> types.ModuleType:
    """A package whose modules come from the folder, without running its own __init__."""
    module = _stub(name)
    module.__path__ = [str(folder / Path(*name.split(".")))]
    return module


class _Flag:
    def get(self) -> bool:
        return False


def _import_sglang(folder: Path) -> None:
    for name in ("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.lora"):
        _package(name, folder)
    _package("sglang.kernels.ops.lora.dense", folder)
    for name in ("sglang.srt", "sglang.srt.lora"):
        _stub(name)
    _stub("sglang.srt.lora.utils", LoRABatchInfo=object)
    _stub(
        "sglang.srt.utils",
        cached_triton_kernel=lambda key=None: lambda kernel: kernel,
        get_device_name=lambda: torch.cuda.get_device_name(),
    )
    flags = types.SimpleNamespace(
        SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=_Flag(), SGLANG_ENABLE_DETERMINISTIC_INFERENCE=_Flag()
    )
    _stub("sglang.srt.environ", envs=flags)
    for name in ("chunked_sgmv_shrink", "chunked_sgmv_expand", "chunked_embedding_lora_a"):
        importlib.import_module(f"sglang.kernels.ops.lora.dense.{name}")


@dataclass
class _SglangInfo:
    seg_indptr: torch.Tensor
    weight_indices: torch.Tensor
    lora_ranks: torch.Tensor
    scalings: torch.Tensor
    permutation: torch.Tensor
    num_segments: int
    max_len: int
    use_cuda_graph: bool = False

    @classmethod
    def of(cls, row_slots: torch.Tensor, ranks: Sequence[int], max_chunk: int) -> _SglangInfo:
        rows = len(row_slots)
        chunk = min(max_chunk, 128 if rows >= 256 else 32 if rows >= 64 else 16)
        permutation = torch.argsort(row_slots, stable=True)
        slots, counts = torch.unique_consecutive(row_slots[permutation], return_counts=True)
        indices, lengths = [], []
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            for begin in range(0, count, chunk):
                indices.append(slot)
                lengths.append(min(chunk, count - begin))

        def ints(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        return cls(
            seg_indptr=ints(list(accumulate(lengths, initial=0))),
            weight_indices=ints(indices),
            lora_ranks=ints(ranks),
            scalings=torch.ones(len(ranks), device=DEVICE),
            permutation=permutation.to(DEVICE, torch.int32),
            num_segments=len(indices),
            max_len=chunk,
        )


@lru_cache(maxsize=2)
def _stacks(shapes: tuple[tuple[int, ...], ...], num_sets: int) -> list[list[torch.Tensor]]:
    """Random weights, [set][stack]: kept while the batches change."""
    return [
        [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5) for shape in shapes]
        for _ in range(num_sets)
    ]


def _sglang(case: DenseCase, max_chunk: int) -> Call:
    shrink = importlib.import_module("sglang.kernels.ops.lora.dense.chunked_sgmv_shrink")
    expand = importlib.import_module("sglang.kernels.ops.lora.dense.chunked_sgmv_expand")
    info = _SglangInfo.of(case.row_slots, case.ranks, max_chunk)
    num_slices, out_dim = len(case.widths), sum(case.widths)
    slots, rank = len(case.ranks), case.max_rank
    stacks = _stacks(((slots, num_slices * rank, case.in_dim), (slots, out_dim, rank)), case.num_sets)
    offsets = torch.tensor([0, *accumulate(case.widths)], dtype=torch.int32)
    device_offsets = offsets.to(DEVICE)

    def call(i: int) -> None:
        h = shrink.chunked_sgmv_lora_shrink_forward(case.x, stacks[i][0], info, num_slices)
        expand.chunked_sgmv_lora_expand_forward(
            h, stacks[i][1], info, device_offsets, max(case.widths), case.y, offsets
        )

    return call


class _Silence:
    """A logger of any methods."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Environment:
    """Every switch at its default."""

    VLLM_TUNED_CONFIG_FOLDER = None

    def __getattr__(self, name: str) -> bool:
        return False


def _import_vllm(folder: Path) -> None:
    _package("vllm", folder).envs = _Environment()  # type: ignore[attr-defined]
    for name in ("vllm.lora", "vllm.lora.ops"):
        _package(name, folder)
    _stub("vllm.envs")
    _stub("vllm.logger", init_logger=lambda name: _Silence())
    platform = types.SimpleNamespace(
        is_cuda=lambda: True,
        has_device_capability=lambda capability: torch.cuda.get_device_capability() >= divmod(capability, 10),
        num_compute_units=lambda index=0: torch.cuda.get_device_properties(index).multi_processor_count,
    )
    _stub("vllm.platforms", current_platform=platform)
    _stub("vllm.triton_utils", triton=triton, tl=tl, HAS_TRITON=True)
    _stub("vllm.triton_utils.allocation", set_triton_allocator=lambda device: None)
    _stub("vllm.utils")
    _stub("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2, cdiv=triton.cdiv)
    _stub(
        "vllm.utils.torch_utils",
        direct_register_custom_op=lambda **_: None,
        async_tensor_h2d=lambda data, device, dtype=None: torch.tensor(data, dtype=dtype).to(device),
    )

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            return None

    sys.modules["vllm.distributed"] = Anything("vllm.distributed")
    importlib.import_module("vllm.lora.ops.triton_ops")


def _vllm(case: DenseCase) -> Call:
    ops = importlib.import_module("vllm.lora.ops.triton_ops")
    utils = importlib.import_module("vllm.lora.ops.triton_ops.utils")
    # It remembers strides by address, and addresses come back.
    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()
    slots, rows, num_slices = len(case.ranks), len(case.row_slots), len(case.widths)
    shapes = [(slots, case.max_rank, case.in_dim)] * num_slices + [(slots, w, case.max_rank) for w in case.widths]
    stacks = _stacks(tuple(shapes), case.num_sets)
    meta = ops.LoRAKernelMeta.make(slots, rows, DEVICE)
    meta.prepare_tensors(case.row_slots.to(torch.int32))

    def call(i: int) -> None:
        h = torch.empty(num_slices, rows, case.max_rank, dtype=torch.float32, device=DEVICE)
        ops.lora_shrink(case.x, stacks[i][:num_slices], h, *meta.meta_args(rows, True), 1.0)
        ops.lora_expand(h, stacks[i][num_slices:], case.y, *meta.meta_args(rows, True), offset_start=0, add_inputs=True)

    return call
