"""The rules that an adapter must keep to be served, and the checks of its tensors. Clients see the codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lorafleet.adapter_store.base_weights import BaseWeights
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import BaseGeometry, ModuleManifest, ModuleShape
from lorafleet.adapter_store.targets import is_output
from lorafleet.adapter_store.tensor_file import TensorEntry, tag_of
from lorafleet.adapter_store.tensors import FloatTag, Tensor

RULES: Final[Mapping[str, str]] = {
    "empty_folder": "The folder holds no adapter at all.",
    "missing_config": "There is no adapter_config.json.",
    "missing_weights": "There is no adapter_model.safetensors.",
    "pickle_weights": "The weights are a pickle, which can run code; only safetensors is read.",
    "config_too_large": "adapter_config.json is larger than any config.",
    "weights_too_large": "The weights file is larger than any adapter of this base can be.",
    "broken_config": "adapter_config.json is no JSON object.",
    "invalid_field": "A field of the config has a wrong type or value.",
    "unsupported_field": "A field of the config asks for something that is not served.",
    "invalid_pattern": "A pattern of the config is no regular expression.",
    "pattern_too_slow": "A pattern of the config takes too long to match.",
    "unknown_target": "target_modules names a module that the base does not have.",
    "no_module": "The adapter changes no module of the base.",
    "rank_too_large": "A module's rank is over the configured limit.",
    "truncated": "The weights file ends before its tensors do.",
    "header_too_large": "The weights file's header is larger than any header.",
    "broken_safetensors": "The weights file contradicts its own header.",
    "unmatched_tensor": "A tensor belongs to no targeted module of the base.",
    "missing_tensor": "A targeted module lacks one of its tensors.",
    "wrong_shape": "A tensor's shape is not that of the base's module and the rank.",
    "unsupported_dtype": "A tensor is not of float64, float32, float16 or bfloat16.",
    "non_finite": "A tensor holds a NaN or an infinity.",
    "overflow": "A value is too large for the dtype that is served.",
    "base_weights_changed": "The file brings weights of the base that differ from the base's own.",
    "base_weights_unverified": "The file brings weights of the base, and the base's own are not at hand to compare.",
}

_PREFIX = "base_model.model."
_FACTORS = {"linear": (".lora_A.weight", ".lora_B.weight"), "embedding": (".lora_embedding_A", ".lora_embedding_B")}
_BASE_ENDS = (".base_layer.weight", ".base_layer.bias", ".weight", ".bias")


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A tensor of the file that is a weight of the base, not of the adapter."""

    tensor: str
    module: str
    leaf: str


@dataclass(frozen=True, slots=True)
class MatchedTensors:
    """Every tensor of a weights file with its place."""

    factors: Mapping[str, tuple[str, str]]
    """Module -> names of its A and B tensors."""
    base_copies: tuple[BaseCopy, ...]


def factor_names(module: str, shape: ModuleShape) -> tuple[str, str]:
    """PEFT's names of a module's A and B tensors."""
    a_end, b_end = _FACTORS[shape.kind]
    return f"{_PREFIX}{module}{a_end}", f"{_PREFIX}{module}{b_end}"


def modules_present(entries: Mapping[str, TensorEntry], geometry: BaseGeometry) -> set[str]:
    """Modules of the base for which a file has both factors."""
    return {
        name for name, shape in geometry.modules.items() if all(key in entries for key in factor_names(name, shape))
    }


def check_ranks(modules: Sequence[ModuleManifest], max_rank: int) -> None:
    """Rule `rank_too_large`."""
    for module in modules:
        if module.rank > max_rank:
            raise AdapterRefused(
                "rank_too_large", f"rank {module.rank} of {module.name} is over the limit of {max_rank}", "r"
            )


def match_tensors(
    entries: Mapping[str, TensorEntry], modules: Sequence[ModuleManifest], geometry: BaseGeometry
) -> MatchedTensors:
    """Give every tensor its place. Rules `missing_tensor`, `wrong_shape`, `unsupported_dtype`, `unmatched_tensor`."""
    factors = {module.name: factor_names(module.name, geometry.modules[module.name]) for module in modules}
    placed = {name for pair in factors.values() for name in pair}
    copies = [_base_copy(name, geometry) for name in entries if name not in placed]
    for module in modules:
        shape = geometry.modules[module.name]
        a_name, b_name = factors[module.name]
        _check_entry(entries, a_name, (module.rank, shape.in_dim), module.name)
        _check_entry(entries, b_name, (shape.out_dim, module.rank), module.name)
    return MatchedTensors(factors, tuple(copies))


def check_values(name: str, tensor: Tensor, served: FloatTag) -> Tensor:
    """The tensor in the served type. Rules `non_finite`, `overflow`."""
    if not tensor.is_finite():
        raise AdapterRefused("non_finite", f"tensor {name} holds a NaN or an infinity", name)
    converted = tensor.to(served)
    if converted is not tensor and not converted.is_finite():
        raise AdapterRefused("overflow", f"tensor {name} holds a value too large for {served}", name)
    return converted


def check_base_copy(copy: BaseCopy, saved: Tensor, base: BaseWeights | None, geometry: BaseGeometry) -> None:
    """A weight of the base in an adapter's file is dropped if it is the base's own: nothing is changed by it then.

    Rules `base_weights_changed`, `base_weights_unverified`.
    """
    own = base.read(copy.module, copy.leaf) if base is not None else None
    if own is None and base is not None and is_output(copy.module, geometry.modules[copy.module], geometry):
        own = _tied(copy, saved, base, geometry)
    if own is None:
        message = f"tensor {copy.tensor} is a weight of the base, and the base's own is not at hand to compare it with"
        raise AdapterRefused("base_weights_unverified", message, copy.tensor)
    # Training may have held the base in a narrower type than its checkpoint, and saved it in a wider one.
    vias: tuple[FloatTag, ...] = (own.tag, "BF16", "F16")
    if own.shape != saved.shape or not any(own.to(via).to(saved.tag).has_bits_of(saved) for via in vias):
        message = f"tensor {copy.tensor} is a weight of the base and differs from the base's own"
        raise AdapterRefused("base_weights_changed", message, copy.tensor)


def _tied(copy: BaseCopy, saved: Tensor, base: BaseWeights, geometry: BaseGeometry) -> Tensor | None:
    for name, shape in geometry.modules.items():
        if shape.kind == "embedding" and (shape.in_dim, shape.out_dim) == saved.shape:
            return base.read(name, copy.leaf)
    return None


def _base_copy(tensor: str, geometry: BaseGeometry) -> BaseCopy:
    name = tensor.removeprefix(_PREFIX)
    if name != tensor:
        for end in _BASE_ENDS:
            module = name.removesuffix(end)
            if module != name and module in geometry.modules:
                return BaseCopy(tensor, module, end.rpartition(".")[2])
    raise AdapterRefused(
        "unmatched_tensor", f"tensor {tensor[:200]} belongs to no targeted module of the base", tensor[:200]
    )


def _check_entry(entries: Mapping[str, TensorEntry], name: str, shape: tuple[int, int], module: str) -> None:
    if name not in entries:
        raise AdapterRefused("missing_tensor", f"{module} is targeted, but there is no tensor {name}", name)
    entry = entries[name]
    if entry.shape != shape:
        message = f"tensor {name} has shape {list(entry.shape)}: the base and the rank make it {list(shape)}"
        raise AdapterRefused("wrong_shape", message, name)
    if tag_of(entry) is None:
        raise AdapterRefused("unsupported_dtype", f"tensor {name} is of type {entry.tag}", name)
