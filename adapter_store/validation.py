"""The rules that an adapter must keep to be served, and the checks of its tensors. Clients see the codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lorafleet.adapter_store.base_weights import BaseWeights, own_weight
from lorafleet.adapter_store.contents import BaseCopy
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import BaseGeometry, ModuleManifest
from lorafleet.adapter_store.targets import is_output
from lorafleet.adapter_store.tensors import FloatTag, Tensor

_LARGEST: Final[Mapping[FloatTag, float]] = {"F64": 1.79e308, "F32": 3.4028e38, "F16": 65504.0, "BF16": 3.3895e38}

RULES: Final[Mapping[str, str]] = {
    "empty_folder": "The folder holds no adapter at all.",
    "missing_config": "There is no adapter_config.json.",
    "missing_weights": "There is no adapter_model.safetensors.",
    "sharded_weights": "The weights are cut into several files, which PEFT neither writes nor reads.",
    "pickle_weights": "The weights are a pickle, which can run code; only safetensors is read.",
    "config_too_large": "adapter_config.json, or a file of its tokenizer, is larger than any such file.",
    "weights_too_large": "The weights file is larger than any adapter of this base can be.",
    "broken_config": "adapter_config.json is not a JSON object.",
    "invalid_field": "A field of the config has a wrong type or value.",
    "unsupported_field": "A field of the config asks for something that is not served.",
    "invalid_pattern": "A pattern of the config is not a regular expression.",
    "pattern_too_slow": "A pattern of the config takes too long to match.",
    "unknown_target": "target_modules names no module of the base, or one that LoRA cannot be on here.",
    "no_module": "The adapter changes no module of the base.",
    "rank_too_large": "A module's rank is over the configured limit.",
    "truncated": "The weights file ends before its tensors do.",
    "header_too_large": "The weights file's header is larger than any header.",
    "broken_safetensors": "The weights file contradicts its own header.",
    "unmatched_tensor": "A tensor belongs to nothing that the config asks for, or lacks the prefix that others have.",
    "missing_tensor": "What the config asks for lacks one of its tensors.",
    "wrong_shape": "A tensor's shape is not that of the base's module and the rank.",
    "vocabulary_resized": "The vocabulary is not the base's, and the file lacks rows of it or has LoRA on them.",
    "unsupported_dtype": "A tensor is not of float64, float32, float16 or bfloat16.",
    "non_finite": "A tensor holds a NaN or an infinity.",
    "overflow": "A value, a scaling or a product of both is too large for the dtype that is served.",
    "base_weights_changed": "The file brings weights of the base that differ from the base's own.",
    "tokenizer_differs": "The adapter's tokenizer maps tokens otherwise than the base's.",
    "broken_chat_file": "The chat template, or a file of the tokenizer, cannot be read.",
    "base_weights_unverified": "The base's own weights are not at hand to compare with what the file brings of them.",
}


def check_ranks(modules: Sequence[ModuleManifest], max_rank: int, field: str) -> None:
    """Rule `rank_too_large`; `field` of the config is what made the ranks."""
    for module in modules:
        if module.rank > max_rank:
            raise AdapterRefused(
                "rank_too_large",
                f"rank {module.rank} of {module.name} is over the limit of {max_rank}: raise adapters.max_rank",
                field,
            )


def check_values(name: str, tensor: Tensor, served: FloatTag) -> Tensor:
    """The tensor in the served type. Rules `non_finite`, `overflow`."""
    if not tensor.is_finite():
        raise AdapterRefused("non_finite", f"tensor {name} holds a NaN or an infinity", name)
    converted = tensor.to(served)
    if converted is not tensor and not converted.is_finite():
        raise AdapterRefused("overflow", f"tensor {name} holds a value too large for {served}", name)
    return converted


def check_products(module: ModuleManifest, a: Tensor, b: Tensor, served: FloatTag) -> None:
    """Rule `overflow` for what is computed with the factors: neither scaling nor delta may leave the floats' range.

    `a` and `b` are as in a file of linear modules: B @ A has sums over the rank.
    """
    largest = _LARGEST[served]
    if abs(module.scaling) > _LARGEST["F32"]:
        message = f"the scaling {module.scaling:.3g} of {module.name} is too large for float32: lower lora_alpha"
        raise AdapterRefused("overflow", message, "lora_alpha")
    rows, columns = np.abs(a.to("F32").array).max(axis=1), np.abs(b.to("F32").array).max(axis=0)
    with np.errstate(over="ignore"):
        bound = abs(module.scaling) * float(rows.astype(np.float64) @ columns.astype(np.float64))
    if bound > largest:
        message = f"scaling * B @ A of {module.name} may reach {bound:.3g}, too large for {served}: lower lora_alpha"
        raise AdapterRefused("overflow", message, "lora_alpha")


def is_replaceable(copy: BaseCopy, geometry: BaseGeometry) -> bool:
    """Return True if an adapter may replace this parameter of the base."""
    shape = geometry.modules.get(copy.module)
    if shape is None:
        return f"{copy.module}.{copy.leaf}" in geometry.vectors
    return shape.kind == "embedding" or is_output(copy.module, shape, geometry)


def is_copy(saved: Tensor, own: Tensor) -> bool:
    """Return True if a tensor of a file is the base's own, perhaps rounded.

    Training may have held the base in a narrower type than its checkpoint, and saved it in a wider one.
    """
    vias: tuple[FloatTag, ...] = (own.tag, "BF16", "F16")
    return own.shape == saved.shape and any(own.to(via).to(saved.tag).has_bits_of(saved) for via in vias)


def check_base_copy(copy: BaseCopy, saved: Tensor, base: BaseWeights | None, geometry: BaseGeometry) -> None:
    """A weight of the base in an adapter's file is dropped if it is the base's own: nothing is changed by it then.

    Rules `base_weights_changed`, `base_weights_unverified`.
    """
    own = own_weight(base, geometry, copy.module, copy.leaf)
    if own is None:
        message = f"tensor {copy.tensor} is a weight of the base, and the base's own is not at hand to compare it with"
        raise AdapterRefused("base_weights_unverified", message, copy.tensor)
    if not is_copy(saved, own):
        message = f"tensor {copy.tensor} is a weight of the base and differs from the base's own"
        if not is_replaceable(copy, geometry):
            message += f": {copy.module} is not one that an adapter can replace here"
        raise AdapterRefused("base_weights_changed", message, copy.tensor)
