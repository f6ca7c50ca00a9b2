"""Checkpoints with quantised weights, written as their makers' tools do, and beside each the weights it stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
"""Inputs that share a scale."""
BLOCK = (32, 48)
"""Of outputs and inputs, likewise."""

Made = tuple[dict[str, Tensor], Tensor]
"""Tensors by the ends of their names in the module, and the weight that they stand for."""


def _fp8(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    values = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, values.double() * scales.double()


def fp8_rows(weight: Tensor) -> Made:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    values, exact = _fp8(weight, scales.float())
    return {"weight": values, "weight_scale": scales}, exact


def fp8_tensor(weight: Tensor) -> Made:
    scale = (weight.abs().amax() / 448).reshape(1)
    values, exact = _fp8(weight, scale)
    return {"weight": values, "weight_scale": scale, "input_scale": torch.ones(1)}, exact


def fp8_blocks(weight: Tensor) -> Made:
    """DeepSeek's: the last blocks of a side may be cut short."""
    rows, columns = BLOCK
    scales = torch.stack(
        [
            torch.stack([block.abs().amax() / 448 for block in torch.split(line, columns, 1)])
            for line in torch.split(weight, rows, 0)
        ]
    )
    spread = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    values, exact = _fp8(weight, spread)
    return {"weight": values, "weight_scale_inv": scales}, exact


def int8_rows(weight: Tensor) -> Made:
    scales = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scales).round().to(torch.int8)
    return {"weight": values, "weight_scale": scales}, values.double() * scales.double()


def _integers(weight: Tensor, bits: int, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, in) integers from 0 on, (out, groups) scales and zero points, and the weight that they stand for."""
    top, columns = (1 << bits) - 1, [group == each for each in range(int(group.max()) + 1)]
    least = torch.stack([weight[:, own].amin(1) for own in columns], 1)
    most = torch.stack([weight[:, own].amax(1) for own in columns], 1)
    scales = ((most - least) / (top - 1)).half().float()
    zeros = (-least / scales).round().clamp(1, top)
    values = (weight / scales[:, group] + zeros[:, group]).round().clamp(0, top)
    exact = (values - zeros[:, group]).double() * scales[:, group].double()
    return values.long(), scales, zeros.long(), exact


def _groups(weight: Tensor, *, shuffled: bool = False) -> Tensor:
    group = torch.arange(weight.shape[1]) // GROUP
    return group[torch.randperm(len(group), generator=torch.Generator().manual_seed(0))] if shuffled else group


def _packed(values: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Words along the last dimension: bits * i + 0 and up of a word hold its value order[i]."""
    count = 32 // bits
    words = values.reshape(*values.shape[:-1], -1, count)[..., order or list(range(count))]
    whole = (words << (bits * torch.arange(count))).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int()


def int4_packed(weight: Tensor, bits: int = 4) -> Made:
    """compressed-tensors' with zero points, the groups out of order."""
    group = _groups(weight, shuffled=True)
    values, scales, zeros, exact = _integers(weight, bits, group)
    tensors = {
        "weight_packed": _packed(values, bits),
        "weight_scale": scales,
        "weight_zero_point": _packed(zeros.t(), bits).t().contiguous(),
        "weight_g_idx": group.int(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, exact


def int4_symmetric(weight: Tensor) -> Made:
    """compressed-tensors' without zero points."""
    scales = weight.view(len(weight), -1, GROUP).abs().amax(2) / 7
    spread = scales.repeat_interleave(GROUP, 1)
    values = (weight / spread).round().clamp(-8, 7).long()
    tensors = {"weight_packed": _packed(values + 8, 4), "weight_scale": scales}
    return tensors | {"weight_shape": torch.tensor(weight.shape)}, values.double() * spread.double()


def awq(weight: Tensor) -> Made:
    values, scales, zeros, exact = _integers(weight, 4, _groups(weight))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "qweight": _packed(values.t(), 4, order),
        "qzeros": _packed(zeros.t(), 4, order),
        "scales": scales.t().half().contiguous(),
    }
    return tensors, exact


def _gptq(weight: Tensor, less: int, bits: int, shuffled: bool) -> Made:
    group = _groups(weight, shuffled=shuffled)
    values, scales, zeros, exact = _integers(weight, bits, group)
    tensors = {
        "qweight": _packed(values, bits).t().contiguous(),
        "qzeros": _packed(zeros.t() - less, bits),
        "scales": scales.t().half().contiguous(),
        "g_idx": group.int(),
    }
    return tensors, exact


def _tensors_config(kind: str, **fields: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    } | fields


KINDS: dict[str, tuple[Callable[[Tensor], Made], dict[str, Any]]] = {
    "fp8_rows": (fp8_rows, _tensors_config("float-quantized")),
    "fp8_tensor": (fp8_tensor, _tensors_config("float-quantized")),
    "fp8_blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "int8_rows": (int8_rows, _tensors_config("int-quantized")),
    "int4_packed": (int4_packed, _tensors_config("pack-quantized")),
    "int4_symmetric": (int4_symmetric, _tensors_config("pack-quantized")),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": GROUP}),
    "gptq": (lambda weight: _gptq(weight, 1, 4, True), {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "gptq_v2": (
        lambda weight: _gptq(weight, 0, 8, False),
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
    ),
}


def write_mxfp4(base: Path, folder: Path) -> None:
    """A copy of a tiny gpt-oss with random codes of four bits in the place of its experts' matrices."""
    shutil.copytree(base, folder)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, value in load_file(base / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        num_experts, in_dim, out_dim = value.shape
        shape = (num_experts, out_dim, in_dim // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator).byte()
        tensors[f"{name}_scales"] = torch.randint(121, 126, shape, generator=generator).byte()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _add_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def write_quantised(base: Path, kind: str, quantised: Path, plain: Path) -> None:
    """Quantise the linear weights of the base's layers; `plain` gets the base with the weights that came of it."""
    quantise, config = KINDS[kind]
    for folder in (quantised, plain):
        shutil.copytree(base, folder)
    tensors, exact = {}, {}
    for name, value in load_file(base / "model.safetensors").items():
        tensors[name] = exact[name] = value
        if name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            parts, weight = quantise(value.float())
            del tensors[name]
            tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
            exact[name] = weight.to(value.dtype).contiguous()
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    _add_config(quantised, config)


def _add_config(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
