"""What an adapter brings beside low-rank factors: parameters in the base's place, magnitudes, and biases to add."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lorafleet.adapter_store.base_weights import BaseWeights, own_weight
from lorafleet.adapter_store.contents import Contents
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import BaseGeometry, ExtraManifest, magnitude_of, shared_extra
from lorafleet.adapter_store.tensor_file import TensorFile
from lorafleet.adapter_store.tensors import Tensor
from lorafleet.adapter_store.validation import check_values


@dataclass(frozen=True, slots=True)
class Extra:
    """An extra before it is rounded to the served type."""

    manifest: ExtraManifest
    source: str
    """Where the file has it, or the last part of it."""
    tensor: Tensor
    """(num_rows, width)."""

    @property
    def head(self) -> bytes:
        """What a digest must cover beside the array."""
        m = self.manifest
        return json.dumps([m.name, m.kind, m.num_rows, m.width, self.tensor.tag]).encode()


def read_extras(
    file: TensorFile,
    contents: Contents,
    scalings: Mapping[str, float],
    base: BaseWeights | None,
    geometry: BaseGeometry,
) -> list[Extra]:
    """All extras, sorted by name; `scalings` are those of the modules with LoRA. A bias like the base's is none.

    Raises AdapterRefused `base_weights_unverified` when a trained bias has no bias of the base to be compared with.
    """
    added = _added(file, contents, scalings, base, geometry)
    extras = [*_replaced(file, contents), *_magnitudes(file, contents), *added]
    return sorted(extras, key=lambda extra: extra.manifest.name)


def _replaced(file: TensorFile, contents: Contents) -> Iterator[Extra]:
    for parameter, name in contents.replaced.items():
        tensor = file.read(name)
        array = tensor.array.reshape(-1, tensor.shape[-1])
        yield Extra(shared_extra(parameter, "replaced", *array.shape), name, Tensor(tensor.tag, array))


def _magnitudes(file: TensorFile, contents: Contents) -> Iterator[Extra]:
    for module, name in contents.magnitudes.items():
        tensor = file.read(name)
        manifest = shared_extra(magnitude_of(module), "magnitude", 1, len(tensor.array))
        yield Extra(manifest, name, Tensor(tensor.tag, tensor.array.reshape(1, -1)))


def _added(
    file: TensorFile,
    contents: Contents,
    scalings: Mapping[str, float],
    base: BaseWeights | None,
    geometry: BaseGeometry,
) -> Iterator[Extra]:
    for module in {**contents.biases, **contents.lora_biases}:
        row = np.zeros(geometry.modules[module].out_dim)
        if module in contents.biases:
            name = contents.biases[module]
            own = own_weight(base, geometry, module, "bias")
            if own is None:
                message = f"tensor {name} is a trained bias, and the base's own is not at hand to compare it with"
                raise AdapterRefused("base_weights_unverified", message, name)
            row += check_values(name, file.read(name), "F64").float64() - own.float64()
        if module in contents.lora_biases:
            name = contents.lora_biases[module]
            row += scalings[module] * check_values(name, file.read(name), "F64").float64()
        if np.any(row):
            yield Extra(shared_extra(module, "added", 1, len(row)), name, Tensor("F64", row.reshape(1, -1)))
