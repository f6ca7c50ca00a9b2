"""The weights of a base as its safetensors files have them, read when asked for; quantised ones come dequantised."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from lorafleet.adapter_store.renaming import renamed
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.model.dequantise import FP8_TAG, dequantise, parts_of, row_scales
from lorafleet.workers.model.text_part import KEYS
from lorafleet.workers.weight_format import WeightFormat, format_of

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight that several tensors make together. It is dequantised on `device` each time that it is read."""

    files: Mapping[str, Any]
    """Role of a tensor -> the open file that has it."""
    names: Mapping[str, str]
    """Role -> name."""
    format: WeightFormat
    device: torch.device

    def __getitem__(self, index: Any) -> Tensor:
        """In float32."""
        parts = {role: self.files[role].get_tensor(name).to(self.device) for role, name in self.names.items()}
        return dequantise(self.format, parts)[index]

    @property
    def row_scales(self) -> Tensor | None:
        """(out_dim,) float32, on the device, of an fp8 matrix whose rows have one scale each; else None."""
        values = self.files["values"].get_slice(self.names["values"])
        if values.get_dtype() != FP8_TAG or self.names.keys() != {"values", "scales"}:
            return None
        scales = self.files["scales"].get_tensor(self.names["scales"]).to(self.device)
        return row_scales(values.get_shape(), scales)


class StoredWeights(Mapping[str, Any]):
    """Weights by their names in the files: safetensors' slices, and `QuantisedWeight`s, which are read by indexing."""

    def __init__(self, source: str, config: PretrainedConfig, device: torch.device) -> None:
        """Raises UnsupportedModel when the files cannot be read, or keep their weights in an unknown format."""
        self.format = format_of(source, config)
        try:
            self._weights = dict(self._open(source, device))
        except (OSError, ValueError, SafetensorError) as error:
            raise UnsupportedModel(f"model.source {source!r} cannot be loaded: {error}") from error

    def _open(self, source: str, device: torch.device) -> Iterator[tuple[str, Any]]:
        file_of: dict[str, Any] = {}
        for path, names in files_of(source).items():
            file: Any = safe_open(path, framework="pt", device="cpu")
            file_of |= dict.fromkeys(names or file.keys(), file)
        if self.format is None:
            for name, file in file_of.items():
                yield name, file.get_slice(name)
            return
        tags = {name: file.get_slice(name).get_dtype() for name, file in file_of.items()}
        for weight, parts in parts_of(self.format, tags).items():
            if "" in parts:
                yield weight, file_of[weight].get_slice(weight)
            else:
                files = {role: file_of[name] for role, name in parts.items()}
                yield weight, QuantisedWeight(files, parts, self.format, device)

    def __getitem__(self, name: str) -> Any:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def name_in(model: PreTrainedModel, stored: str) -> str:
    """The parameter of the model that a tensor of the checkpoint is, by transformers' rules."""
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


def files_of(source: str) -> dict[str, list[str] | None]:
    """Path of each file of weights, and the tensors in it; None: all that it has. Raises UnsupportedModel."""
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
