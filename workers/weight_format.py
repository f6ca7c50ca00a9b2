"""Formats of weights in fewer bits, as `quantization_config` in a base's config.json tells them; without torch.

Which weights are quantised follows from the tensors that are there, so lists of modules that are not (`ignore`,
`modules_to_not_convert`) need not be read. How activations, keys and values are to be rounded is not used: rows have
scales of their own here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorafleet.workers.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Layout = Literal["scaled", "packed", "awq", "gptq", "gptq_v2", "mxfp4"]
"""Values of 8 bits and their scales, compressed-tensors' packed integers, AutoAWQ's `gemm`, AutoGPTQ's, OCP's MXFP4."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Format of a checkpoint's quantised weights."""

    method: str
    layout: Layout
    bits: int = 8
    block: tuple[int, int] | None = None
    """Outputs and inputs that have a scale, where scales are of blocks."""
    has_integers: bool = False
    """True if values of 8 bits may be integers."""


def quantisation_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return what a configuration says of the quantisation of its base's weights; None for a base without."""
    fields: Any = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    return fields if fields is None or isinstance(fields, dict) else fields.to_dict()


def format_of(source: str, config: PretrainedConfig) -> WeightFormat | None:
    """The format of a base's quantised weights; None for a base without. Raises UnsupportedModel for another."""
    fields = quantisation_of(config)
    if fields is None:
        return None
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    read = _READ.get(method)
    found = "which is not supported" if read is None else read(fields)
    if isinstance(found, WeightFormat):
        return found
    raise UnsupportedModel(
        f"model.source {source!r} is quantised by {method}, {found}: use the checkpoint that it was made from"
    )


def _fine_grained_fp8(fields: Mapping[str, Any]) -> WeightFormat | str:
    block = fields.get("weight_block_size")
    return WeightFormat("fp8", "scaled", block=None if block is None else (block[0], block[1]))


def _compressed_tensors(fields: Mapping[str, Any]) -> WeightFormat | str:
    groups = list((fields.get("config_groups") or {}).values())
    kinds = {fields.get("format"), *(group.get("format") for group in groups)} - {None, "dense", "mixed-precision"}
    if (fields.get("transform_config") or {}).get("config_groups"):
        return "with transforms of activations, which are not supported"
    if (fields.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return f"and sparse ({fields['sparsity_config']['format']}), which is not supported"
    if fields.get("quantization_status", "compressed") != "compressed":
        return f"but not compressed (its status is {fields['quantization_status']}), which is not supported"
    if not kinds or not kinds <= {"float-quantized", "naive-quantized", "int-quantized", "pack-quantized"}:
        return f"in the format {', '.join(sorted(map(str, kinds)))}, which is not supported"
    if "pack-quantized" in kinds:
        several = "in several formats, which is not supported"
        return several if len(kinds) > 1 else WeightFormat("compressed-tensors", "packed")
    shapes = [(group.get("weights") or {}).get("block_structure") for group in groups]
    blocks = {(shape[0], shape[1]) for shape in shapes if isinstance(shape, list)}
    if len(blocks) > 1:
        return "in blocks of several sizes, which is not supported"
    return WeightFormat("compressed-tensors", "scaled", block=blocks.pop() if blocks else None, has_integers=True)


def _awq(fields: Mapping[str, Any]) -> WeightFormat | str:
    version = str(fields.get("version") or fields.get("format") or "gemm").lower()
    bits = fields.get("bits", fields.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        return f"in its version {version} of {bits} bits, which is not supported"
    return WeightFormat("awq", "awq", bits=4)


def _gptq(fields: Mapping[str, Any]) -> WeightFormat | str:
    bits, kind = fields.get("bits"), fields.get("checkpoint_format") or "gptq"
    if bits not in (2, 4, 8) or kind not in ("gptq", "gptq_v2"):
        return f"in the format {kind} of {bits} bits, which is not supported"
    return WeightFormat("gptq", "gptq" if kind == "gptq" else "gptq_v2", bits=bits)


_READ: Mapping[str, Callable[[Mapping[str, Any]], WeightFormat | str]] = {
    "fp8": _fine_grained_fp8,
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "mxfp4": lambda fields: WeightFormat("mxfp4", "mxfp4", bits=4),
}
"""Method of quantisation -> its format, or why a checkpoint of it is not supported."""
