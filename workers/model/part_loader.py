"""Loads one rank's part of a base: of each tensor in the checkpoint only the slice that is the rank's.

A base that is not spread over ranks is loaded by transformers itself (`loader.py`).
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.shares import Share, share_of
from lorafleet.workers.model.quantisation import keep_scales
from lorafleet.workers.model.sharding import narrow
from lorafleet.workers.model.stored_weights import QuantisedWeight, StoredWeights, name_in

EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""The number of an expert in the name of its matrix."""
DUMMY_SPREAD = 0.02
"""Of made-up weights, where the configuration has no `initializer_range`."""


def load_part(
    model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, shares: Mapping[str, Share]
) -> PreTrainedModel:
    """The base with this rank's part of its weights on the device.

    Raises UnsupportedModel for what cannot be loaded.
    """
    part = _unloaded(config, dtype)
    narrow(part, shares)
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    if model.load == "dummy":
        _fill_with_dummies(part, device, shares)
    else:
        _read(part, model.source, config, device, shares)
    part.tie_weights()
    return part


@contextmanager
def _matrices_on_meta() -> Iterator[None]:
    """Modules that are made within it have buffers and vectors as ever, and matrices without memory."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.dim() > 1:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _unloaded(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base without matrices. Its buffers are right, but for those that a checkpoint has."""
    with _matrices_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _fill_with_dummies(model: PreTrainedModel, device: torch.device, shares: Mapping[str, Share]) -> None:
    """Made-up weights: parts that several ranks have are the same on each."""
    generator = torch.Generator(device)
    spread = getattr(model.config, "initializer_range", None) or DUMMY_SPREAD
    for name, parameter in list(model.named_parameters()):
        share = share_of(name, shares)
        place = "" if share is None else f"{share.first_input} {share.first_output} {share.first_expert}"
        generator.manual_seed(zlib.crc32(f"{name} {place}".encode()))
        if parameter.device.type == "meta":
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            value.normal_(0.0, spread, generator=generator)
        else:
            value = parameter.detach().to(device)
        _set(model, name, value)


def _read(
    model: PreTrainedModel, source: str, config: PretrainedConfig, device: torch.device, shares: Mapping[str, Share]
) -> None:
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    buffers = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    tied, twins = _tied(model), dict[str, Any]()
    experts = _SingleExperts(model, shares)
    for stored, weight in StoredWeights(source, config, device).items():
        name = name_in(model, stored)
        if name in missing:
            share = share_of(name, shares)
            value = _slice(weight, parameters[name], share, source)
            _set(model, name, value.to(device=device, dtype=parameters[name].dtype))
            missing.remove(name)
            scales = weight.row_scales if isinstance(weight, QuantisedWeight) else None
            keep_scales(model, name, scales if scales is None or share is None else scales[share.outputs])
        elif name in buffers:
            _set_buffer(model, name, weight[...])
        elif name in tied:
            twins[name] = weight
        else:
            experts.note(name, weight)
    for name, value in experts.joined():
        if name in missing and value.shape == parameters[name].shape:
            _set(model, name, value.to(device=device, dtype=parameters[name].dtype))
            missing.remove(name)
    for name, weight in twins.items():
        owner = tied[name]
        value = _slice(weight, parameters[owner], share_of(owner, shares), source)
        value = value.to(device=device, dtype=parameters[owner].dtype)
        if owner in missing:
            _set(model, owner, value)
            missing.remove(owner)
        elif not torch.equal(value, model.get_parameter(owner)):
            raise UnsupportedModel(
                f"model.source {source!r} has a {name} of its own, though its config.json ties it to {owner}: "
                "set tie_word_embeddings to false there, or set worker.tensor_parallel_size to 1"
            )
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UnsupportedModel(f"model.source {source!r} lacks the weights {', '.join(names[:3])}{more}")


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are another one as well -> the name under which it is loaded."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names[id(parameter)] for name, parameter in every if names[id(parameter)] != name}


class _SingleExperts:
    """Matrices of single experts, as checkpoints have them. This rank's are joined by transformers' own rules."""

    def __init__(self, model: PreTrainedModel, shares: Mapping[str, Share]) -> None:
        self._shares = {name: share for name, share in shares.items() if share.shape.kind == "experts"}
        self._rules: list[Any] = []
        for kind in (type(model).__name__, model.config.model_type):
            rules = get_checkpoint_conversion_mapping(kind) if self._shares else None
            if rules is not None:
                self._rules = [rule for rule in rules if isinstance(rule, WeightConverter)]
                break
        self._found: dict[str, dict[str, dict[int, Any]]] = {}
        """Parameter -> pattern of its parts -> expert -> its matrix, unread."""

    def note(self, name: str, weight: Any) -> None:
        """Keep a tensor of the checkpoint, if it is of an expert that is here."""
        parameter, pattern = rename_source_key(name, [], self._rules)
        share, number = self._shares.get(parameter), EXPERT.search(name)
        if share is not None and pattern is not None and number is not None:
            expert = int(number[1]) - share.first_expert
            if 0 <= expert < share.shape.num_experts:
                self._found.setdefault(parameter, {}).setdefault(pattern, {})[expert] = weight

    def joined(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters of which no part is missing, one after another."""
        for parameter, parts in self._found.items():
            rule = copy.deepcopy(next(rule for rule in self._rules if set(parts) <= set(rule.source_patterns)))
            for pattern in rule.source_patterns:
                for _, weight in sorted(parts.get(pattern, {}).items()):
                    rule.add_tensor(parameter, parameter, pattern, partial(weight.__getitem__, ...))
            yield parameter, next(iter(rule.convert(parameter).values()))


def _slice(weight: Any, parameter: Tensor, share: Share | None, source: str) -> Tensor:
    """The part of a stored weight that the parameter takes."""
    view = weight[...] if isinstance(weight, QuantisedWeight) else weight
    shape = view.shape if isinstance(view, Tensor) else view.get_shape()
    parts = (slice(None),) * parameter.dim() if share is None else share.of_parameter(parameter.dim())
    stops = [size if part.stop is None else part.stop for part, size in zip(parts, shape, strict=False)]
    value: Tensor = view[parts] if len(shape) == parameter.dim() else torch.empty(0)
    if value.shape != parameter.shape or any(stop > size for stop, size in zip(stops, shape, strict=True)):
        raise UnsupportedModel(
            f"model.source {source!r} cannot be loaded: its weights have other shapes than its config.json says"
        )
    return value


def read_generation_config(source: str) -> GenerationConfig | None:
    """The checkpoint's settings of generation; None if it has none."""
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(source)
    except OSError:
        return None
    return config


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def _set_buffer(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """Load a buffer, in the dtype that transformers loads it in."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    before = module._buffers[leaf]
    assert before is not None
    plan = model._get_dtype_plan(model.dtype)
    dtype = next((plan[part] for part in name.split(".") if part in plan), before.dtype)
    module._buffers[leaf] = value.to(device=before.device, dtype=dtype)
