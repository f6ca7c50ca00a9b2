"""LoRA on the experts of mixtures: what PEFT calls its tensors, and what older names of it mean.

PEFT wraps a parameter's module once for each parameter that it targets, one wrapper in another. A wrapper's A has an
expert's ranks after another's, its B a rank's experts after another's. Before transformers 5 each expert had linear
modules of its own; PEFT joins their factors, and so does `joined`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import BaseGeometry
from lorafleet.adapter_store.patterns import Pattern, match_patterns
from lorafleet.adapter_store.peft_config import LoraSpec
from lorafleet.adapter_store.tensors import Tensor

_ROUTER = "gate.weight"


@dataclass(frozen=True, slots=True, eq=False)
class OldNames:
    """Names that the modules of a mixture had before transformers 5."""

    projections: Mapping[str, tuple[str, ...]]
    """Parameter of experts -> the linear modules of each expert that it has come from."""

    @property
    def parameters(self) -> dict[str, str]:
        """Last part of an old module's name -> the parameter that PEFT targets for it."""
        found = {old: parameter for parameter, names in self.projections.items() for old in names}
        return {"gate": _ROUTER, **found}


_OF_FAMILY = {
    "mixtral": OldNames({"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
    "qwen2_moe": OldNames({"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
}


def old_names(geometry: BaseGeometry) -> OldNames | None:
    """The old names of this base's experts, if PEFT knows them; None: it has none."""
    pattern = next((known for kind in geometry.kinds if (known := _families().get(kind))), None)
    return None if pattern is None else _OF_FAMILY.get(pattern)


@cache
def _families() -> Mapping[str, str]:
    """`model_type` -> the one whose names it shares, by the table of transformers that PEFT reads."""
    from transformers import conversion_mapping  # takes seconds, and ingresses and controllers need none

    table: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return {**table, "mixtral": "mixtral"}


def with_parameters(spec: LoraSpec, geometry: BaseGeometry) -> LoraSpec:
    """The config with parameters in the place of modules that are no more, as PEFT changes it on loading.

    Raises AdapterRefused `unsupported_field` for only one of several modules that were joined.
    """
    old = old_names(geometry)
    if old is None:
        return spec
    targets = _by_last_parts(spec.target_modules, old, geometry)
    moved = {name: old.parameters.get(name.rpartition(".")[2]) for name in targets}
    if not any(moved.values()):
        return spec
    ranks, alphas = dict(spec.rank_pattern), dict(spec.alpha_pattern)
    lasts = {name.rpartition(".")[2] for name, parameter in moved.items() if parameter}
    for parameter, parts in old.projections.items():
        present = lasts.intersection(parts)
        if 0 < len(present) < len(parts):
            message = f"target_modules names {', '.join(sorted(present))} of experts, but not "
            message += f"{', '.join(sorted({*parts} - present))}: the base has them as one, {parameter}"
            raise AdapterRefused("unsupported_field", message, "target_modules")
        if present and len(parts) > 1:
            ranks[rf".*\.{parameter}"] = spec.rank * len(parts)
            alphas[rf".*\.{parameter}"] = spec.alpha * len(parts)
    return replace(
        spec,
        target_modules=frozenset(name for name, parameter in moved.items() if not parameter),
        target_parameters=spec.target_parameters | {parameter for parameter in moved.values() if parameter},
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _by_last_parts(targets: frozenset[str] | str, old: OldNames, geometry: BaseGeometry) -> frozenset[str]:
    """The names that a config targets; of an expression, the last parts of the names that it matches."""
    if not isinstance(targets, str):
        return targets
    modules = [name for name, shape in geometry.modules.items() if shape.is_module]
    if targets.lower() == "all-linear":
        return frozenset(name.rpartition(".")[2] for name in modules if geometry.modules[name].kind == "linear") | {
            *old.parameters
        }
    owners = {name.rpartition(".")[0] for name, shape in geometry.modules.items() if shape.kind == "experts"}
    names = [*modules, *geometry.parameters]
    names += [name for name, shape in geometry.modules.items() if shape.kind == "router"]
    names += [f"{owner}.{last}" for owner in owners for last in old.parameters if last != "gate"]
    (hits,) = match_patterns([Pattern("fullmatch", targets, "target_modules")], names)
    return frozenset(name.rpartition(".")[2] for name, hit in zip(names, hits, strict=True) if hit is not None)


def wrapper_of(parameter: str, targeted: list[str]) -> str:
    """The name of the wrapper of a parameter of experts; `targeted`: all of theirs that are, in the module's order."""
    owner = parameter.rpartition(".")[0]
    return owner + ".base_layer" * (len(targeted) - 1 - targeted.index(parameter))


def single_modules(parameter: str, num_experts: int, old: OldNames) -> list[list[str]]:
    """Names of the linear modules that a parameter has come from: of each part, of each expert."""
    owner, _, leaf = parameter.rpartition(".")
    return [[f"{owner}.{expert}.{part}" for expert in range(num_experts)] for part in old.projections.get(leaf, ())]


def joined(parts: list[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """A and B of a parameter, of those of its parts' experts, as PEFT joins them: ranks beside ranks."""
    tags = {tensor.tag for part in parts for factors in part for tensor in factors}
    tag = tags.pop() if len(tags) == 1 else "F32"
    arrays = [[(a.to(tag).array, b.to(tag).array) for a, b in part] for part in parts]
    num_experts, rank = len(arrays[0]), arrays[0][0][0].shape[0]
    a = np.concatenate([array for expert in zip(*arrays, strict=True) for array, _ in expert])
    out_dims = [part[0][1].shape[0] for part in arrays]
    b = np.zeros((sum(out_dims), rank * len(parts), num_experts), a.dtype)
    for index, part in enumerate(arrays):
        rows = slice(sum(out_dims[:index]), sum(out_dims[: index + 1]))
        b[rows, index * rank : (index + 1) * rank] = np.stack([factors[1] for factors in part], axis=-1)
    return Tensor(tag, a), Tensor(tag, b.reshape(b.shape[0], -1))


def by_expert(b: Tensor, num_experts: int) -> Tensor:
    """B of a wrapper with an expert's ranks after another's, as A has them."""
    columns = b.array.reshape(b.shape[0], -1, num_experts).transpose(0, 2, 1)
    return Tensor(b.tag, np.ascontiguousarray(columns.reshape(b.shape)))


def transposed(matrix: Tensor) -> Tensor:
    """The matrix with its rows as columns."""
    return Tensor(matrix.tag, np.ascontiguousarray(matrix.array.T))


def experts_of(modules: Iterator[str]) -> dict[str, list[str]]:
    """Module -> those of its parameters among these names, in their order."""
    found: dict[str, list[str]] = {}
    for name in modules:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found
