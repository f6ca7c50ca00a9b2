"""Finds the modules of the base that an adapter targets, with rank and scaling: PEFT's rules over module names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import BaseGeometry, ModuleManifest, ModuleShape, shared_module
from lorafleet.adapter_store.patterns import Pattern, match_patterns
from lorafleet.adapter_store.peft_config import LoraSpec

ALL_LINEAR = "all-linear"

_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
"""A module's layer is the first number in its name that is neither its first nor its second part."""

Number = TypeVar("Number", int, float)


def effective_modules(
    spec: LoraSpec, geometry: BaseGeometry, *, present: Collection[str] = ()
) -> tuple[ModuleManifest, ...]:
    """The modules of the base that PEFT would wrap for this config, sorted by name.

    present: modules for which the weights file has factors. With `ensure_weight_tying`, PEFT wraps the output too if
    the base ties it; then its factors are there.
    Raises AdapterRefused `unknown_target`, `no_module` and what `match_patterns` raises.
    """
    targets = _targeted(spec, geometry)
    excluded = _excluded(spec, targets, geometry)
    parameters = targeted_parameters(spec, geometry)
    names = sorted((targets - excluded) | parameters.keys())
    if spec.ensure_weight_tying:
        names = sorted({*names, *(tied_outputs(names, geometry) & set(present))})
    if not names:
        absent = unmatched_targets(spec, geometry)
        if not spec.target_modules:
            message = f"target_parameters names no parameter that LoRA can be on here: {listed(spec.target_parameters)}"
            raise AdapterRefused("unknown_target", message, "target_parameters")
        if absent and not targets:
            message = f"target_modules names no module of the base: {listed(absent)}"
            raise AdapterRefused("unknown_target", message, "target_modules")
        message = "the adapter changes no module of the base"
        if isinstance(spec.target_modules, str) and not targets:
            message += f": no name as a whole matches the expression {spec.target_modules[:100]!r} of target_modules"
        raise AdapterRefused("no_module", message, "target_modules")
    keys = [(parameters[name],) if name in parameters else _names(name, geometry) for name in names]
    ranks = _by_pattern(spec.rank_pattern, keys, spec.rank, "rank_pattern")
    alphas = _by_pattern(spec.alpha_pattern, keys, spec.alpha, "alpha_pattern")
    return tuple(
        shared_module(name, rank, alpha / math.sqrt(rank) if spec.use_rslora else alpha / rank)
        for name, rank, alpha in zip(names, ranks, alphas, strict=True)
    )


def unmatched_targets(spec: LoraSpec, geometry: BaseGeometry) -> list[str]:
    """Names in `target_modules` that no module of the base ends in; PEFT passes over them if another one matches.

    Raises AdapterRefused `unknown_target` for a name of what the base has, `exclude_modules` does not name, and LoRA
    cannot be on here.
    """
    if isinstance(spec.target_modules, str):
        return []
    names = [name for module in _modules(geometry) for name in _names(module, geometry)]
    absent = spec.target_modules.difference(*map(_ends, names))
    if not absent:
        return []
    others = {owner for parameter in geometry.parameters for owner in _owners(parameter)}
    others -= _excluded(spec, others, geometry)
    there = absent.intersection(*[{end for owner in others for end in _ends(owner)}])
    if there:
        message = f"target_modules names what the base has, but LoRA cannot be on here: {listed(there)}"
        raise AdapterRefused("unknown_target", message, "target_modules")
    return sorted(absent)


def targeted_parameters(spec: LoraSpec, geometry: BaseGeometry) -> dict[str, str]:
    """Experts, routers and linear modules of whose parameters `target_parameters` has the ends, each with its own."""
    found: dict[str, str] = {}
    for name, shape in geometry.modules.items() if spec.target_parameters else ():
        leaf = "" if shape.kind == "experts" else ".weight"
        parameters = [own + leaf for own in _names(name, geometry)]
        if shape.kind != "embedding" and not spec.target_parameters.isdisjoint(
            end for parameter in parameters for end in _ends(parameter)
        ):
            found[name] = parameters[-1]
    return found


def unmatched_parameters(spec: LoraSpec, geometry: BaseGeometry) -> list[str]:
    """Names in `target_parameters` that no parameter of the base ends in; PEFT passes over them.

    Raises AdapterRefused `unknown_target` for a name of what the base has and LoRA cannot be on here.
    """
    absent = spec.target_parameters.difference(*map(_ends, targeted_parameters(spec, geometry).values()))
    there = absent.intersection(*[{end for parameter in geometry.parameters for end in _ends(parameter)}])
    if there:
        message = f"target_parameters names what the base has, but LoRA cannot be on here: {listed(there)}"
        raise AdapterRefused("unknown_target", message, "target_parameters")
    return sorted(absent)


def tied_outputs(names: Collection[str], geometry: BaseGeometry) -> set[str]:
    """Outputs that use the matrix of an embedding among `names`."""
    return {output for output, embedding in geometry.tied.items() if embedding in names}


def is_output(name: str, shape: ModuleShape, geometry: BaseGeometry) -> bool:
    """Return True for the base's output embedding: a linear module in no layer, with the vocabulary as outputs."""
    if shape.kind != "linear" or any(part.isdigit() for part in name.split(".")):
        return False
    return any(other.kind == "embedding" and other.in_dim == shape.out_dim for other in geometry.modules.values())


def _modules(geometry: BaseGeometry) -> dict[str, ModuleShape]:
    """Those that `target_modules` may name."""
    return {name: shape for name, shape in geometry.modules.items() if shape.is_module}


def _targeted(spec: LoraSpec, geometry: BaseGeometry) -> set[str]:
    modules = _modules(geometry)
    if isinstance(spec.target_modules, str):
        if spec.target_modules.lower() == ALL_LINEAR:
            linear = {name: shape for name, shape in modules.items() if shape.kind == "linear"}
            return {name for name, shape in linear.items() if not is_output(name, shape, geometry)}
        return _fully_matching(spec.target_modules, list(modules), "target_modules", geometry)
    ends = {
        name: {end for own in _names(name, geometry) for end in spec.target_modules.intersection(_ends(own))}
        for name in modules
    }
    layers = _layers(spec, list(modules)) if spec.layers_to_transform else {}
    return {
        name
        for name, matched in ends.items()
        # A module that is named in full is wrapped whatever layers_to_transform says.
        if matched
        and (
            not matched.isdisjoint(_names(name, geometry))
            or not spec.layers_to_transform
            or layers[name] in spec.layers_to_transform
        )
    }


def _excluded(spec: LoraSpec, names: Collection[str], geometry: BaseGeometry) -> set[str]:
    # What is trained as a whole, and all that is within it.
    saved = {name for name in names if any(f".{part}." in f".{name}." for part in spec.modules_to_save)}
    if not isinstance(spec.exclude_modules, str):
        ends = {name: {end for own in _names(name, geometry) for end in _ends(own)} for name in names}
        return saved | {name for name in names if not spec.exclude_modules.isdisjoint(ends[name])}
    if not spec.exclude_modules:
        return saved
    return saved | _fully_matching(spec.exclude_modules, list(names), "exclude_modules", geometry)


def _names(module: str, geometry: BaseGeometry) -> tuple[str, ...]:
    """A module's name, and the one that it has in the whole of a multimodal model."""
    whole = geometry.whole_names.get(module)
    return (module,) if whole is None else (module, whole)


def _owners(parameter: str) -> Iterator[str]:
    """A parameter's module, and all that this is within."""
    while parameter := parameter.rpartition(".")[0]:
        yield parameter


def listed(names: Collection[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(sorted(names)[:5])[:300] + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _ends(name: str) -> Iterator[str]:
    """`a.b.c` -> a.b.c, b.c, c."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _fully_matching(regex: str, modules: Sequence[str], field: str, geometry: BaseGeometry) -> set[str]:
    owners = [(name, module) for module in modules for name in _names(module, geometry)]
    (hits,) = match_patterns([Pattern("fullmatch", regex, field)], [name for name, _ in owners])
    return {module for (_, module), hit in zip(owners, hits, strict=True) if hit is not None}


def _layers(spec: LoraSpec, names: Sequence[str]) -> dict[str, int | None]:
    """Layer index of each module by the first of `layers_pattern` that matches."""
    if not spec.layers_pattern:
        matches = {name: _ANY_LAYER.match(name) for name in names}
        return {name: int(match["idx"]) if match else None for name, match in matches.items()}
    patterns = [
        Pattern("match", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", "layers_pattern") for pattern in spec.layers_pattern
    ]
    layers: dict[str, int | None] = dict.fromkeys(names)
    for hits in reversed(match_patterns(patterns, names)):
        layers.update({name: int(hit) for name, hit in zip(names, hits, strict=True) if hit})
    return layers


def _by_pattern(
    table: Mapping[str, Number], keys: Sequence[tuple[str, ...]], default: Number, field: str
) -> list[Number]:
    """Each module's value: that of the first pattern whose match ends one of its names at a dot, else the default."""
    patterns = [Pattern("match", rf"(.*\.)?({pattern})$", field) for pattern in table]
    names = [name for own in keys for name in own]
    values = [default] * len(keys)
    for value, hits in reversed(list(zip(table.values(), match_patterns(patterns, names), strict=True))):
        matched = {name for name, hit in zip(names, hits, strict=True) if hit is not None}
        values = [old if matched.isdisjoint(own) else value for old, own in zip(values, keys, strict=True)]
    return values
