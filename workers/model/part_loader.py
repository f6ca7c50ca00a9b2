"""Loads one rank's part of a base: of each tensor in the checkpoint only the slice that is the rank's.

A base that is not spread over ranks is loaded by transformers itself (`loader.py`).
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from lorafleet.adapter_store.renaming import renamed
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.shares import Share
from lorafleet.workers.model.sharding import narrow
from lorafleet.workers.model.text_part import KEYS

WEIGHTS = "model.safetensors"
DUMMY_SPREAD = 0.02
"""Of made-up weights, where the configuration has no `initializer_range`."""


def load_part(
    model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, shares: Mapping[str, Share]
) -> PreTrainedModel:
    """The base with this rank's part of its weights on the device.

    Raises UnsupportedModel for what cannot be loaded.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"model.source {model.source!r} is quantised, and cannot be cut for several ranks")
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
    """The base without matrices. Its buffers, which no checkpoint has, are right."""
    with _matrices_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _fill_with_dummies(model: PreTrainedModel, device: torch.device, shares: Mapping[str, Share]) -> None:
    """Made-up weights: parts that several ranks have are the same on each."""
    generator = torch.Generator(device)
    spread = getattr(model.config, "initializer_range", None) or DUMMY_SPREAD
    for name, parameter in list(model.named_parameters()):
        share = shares.get(name.rpartition(".")[0])
        place = "" if share is None else f"{share.first_input} {share.first_output}"
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
    for path, stored_names in _files(source).items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for stored in stored_names or file.keys():
                    name = _name_in(model, stored)
                    if name in missing:
                        share = shares.get(name.rpartition(".")[0])
                        value = _slice(file, stored, parameters[name], share, source)
                        _set(model, name, value.to(device=device, dtype=parameters[name].dtype))
                        missing.remove(name)
        except (OSError, ValueError) as error:
            raise UnsupportedModel(f"model.source {source!r} cannot be loaded: {error}") from error
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UnsupportedModel(f"model.source {source!r} lacks the weights {', '.join(names[:3])}{more}")


def _slice(file: Any, stored: str, parameter: Tensor, share: Share | None, source: str) -> Tensor:
    """The part of a stored tensor that the parameter takes."""
    view = file.get_slice(stored)
    parts = (slice(None),) * parameter.dim() if share is None else share.of_parameter(parameter.dim())
    shape = view.get_shape()
    stops = [size if part.stop is None else part.stop for part, size in zip(parts, shape, strict=False)]
    value: Tensor = view[parts] if len(shape) == parameter.dim() else torch.empty(0)
    if value.shape != parameter.shape or any(stop > size for stop, size in zip(stops, shape, strict=True)):
        raise UnsupportedModel(
            f"model.source {source!r} cannot be loaded: its weights have other shapes than its config.json says"
        )
    return value


def _name_in(model: PreTrainedModel, stored: str) -> str:
    """The parameter that a tensor of the checkpoint is, by transformers' rules."""
    name = renamed((type(model).__name__, model.config.model_type), stored)
    for pattern, replacement in KEYS.items():
        name = re.sub(pattern, replacement, name)
    prefix = f"{model.base_model_prefix}."
    body = model.base_model
    if body is model or name.startswith(prefix):
        return name
    # A checkpoint of a bare decoder lacks the first part.
    is_of_body = any(name == own for own, _ in body.named_parameters())
    return prefix + name if is_of_body else name


def _files(source: str) -> dict[str, list[str] | None]:
    """Path of each file of weights, and the tensors in it; None: all that it has."""
    index = _find(source, f"{WEIGHTS}.index.json")
    if index is not None:
        names: dict[str, list[str]] = {}
        for stored, file_name in json.loads(Path(index).read_bytes())["weight_map"].items():
            names.setdefault(file_name, []).append(stored)
        found = {file_name: _find(source, file_name) for file_name in names}
    else:
        found, names = {WEIGHTS: _find(source, WEIGHTS)}, {}
    if None in found.values():
        raise UnsupportedModel(
            f"model.source {source!r} cannot be loaded: it has no weights in safetensors files, or they cannot be read"
        )
    return {path: names.get(file_name) for file_name, path in found.items() if path is not None}


def _find(source: str, file_name: str) -> str | None:
    try:
        path: str | None = cached_file(source, file_name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return path


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
