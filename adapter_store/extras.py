"""Extras of an adapter, beside low-rank factors: parameters in the base's place, magnitudes, and biases to add."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lorafleet.adapter_store.base_weights import BaseWeights, own_weight
from lorafleet.adapter_store.contents import Contents
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import BaseGeometry, ExtraManifest, appended_to, magnitude_of, shared_extra
from lorafleet.adapter_store.tensor_file import TensorFile
from lorafleet.adapter_store.tensors import Tensor
from lorafleet.adapter_store.trained import Trained
from lorafleet.adapter_store.validation import check_values, is_copy


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
        """Properties that a digest must cover beside the array."""
        m = self.manifest
        return json.dumps([m.name, m.kind, m.num_rows, m.width, self.tensor.tag]).encode()


def read_extras(
    file: TensorFile,
    contents: Contents,
    scalings: Mapping[str, float],
    trained: Trained,
    base: BaseWeights | None,
    geometry: BaseGeometry,
) -> list[Extra]:
    """All extras, sorted by name; `scalings` are those of the modules with LoRA. A bias like the base's is none.

    Raises AdapterRefused `base_weights_unverified` when a trained bias has no bias of the base to be compared with.
    """
    added = _added(file, contents, scalings, base, geometry)
    resized = _resized(file, contents, trained, base, geometry)
    extras = [*_replaced(file, contents), *_magnitudes(file, contents), *added, *resized]
    return sorted(extras, key=lambda extra: extra.manifest.name)


def _replaced(file: TensorFile, contents: Contents) -> Iterator[Extra]:
    for parameter, name in contents.replaced.items():
        tensor = file.read(name)
        array = tensor.array.reshape(-1, tensor.shape[-1])
        yield Extra(shared_extra(parameter, "replaced", *array.shape), name, Tensor(tensor.tag, array))


def _resized(
    file: TensorFile, contents: Contents, trained: Trained, base: BaseWeights | None, geometry: BaseGeometry
) -> Iterator[Extra]:
    """Return the extras of matrices of another vocabulary: added rows, and others in the base's place."""
    for module, name in contents.resized.items():
        tensor, own = file.read(name), own_weight(base, geometry, module, "weight")
        if own is None:
            message = f"tensor {name} has rows of {module}, and the base's own are not at hand to compare them with"
            raise AdapterRefused("base_weights_unverified", message, name)
        num_own = own.shape[0]
        shared = min(num_own, tensor.shape[0])
        if not is_copy(Tensor(tensor.tag, tensor.array[:shared]), Tensor(own.tag, own.array[:shared])):
            if module not in trained.modules:
                message = f"tensor {name} is a weight of the base and differs from the base's own"
                raise AdapterRefused("base_weights_changed", message, name)
            # Tokens that are taken away come neither in a prompt nor in an answer.
            matrix = np.zeros((num_own, tensor.shape[1]), tensor.array.dtype)
            matrix[:shared] = tensor.array[:shared]
            yield Extra(shared_extra(f"{module}.weight", "replaced", *matrix.shape), name, Tensor(tensor.tag, matrix))
        if len(tensor.array) > num_own:
            rows = Tensor(tensor.tag, np.ascontiguousarray(tensor.array[num_own:]))
            if module in trained.tokens:
                rows = _with_trained(rows, file.read(contents.token_rows_of(module, trained)), trained, module)
            yield Extra(shared_extra(appended_to(module), "appended", *rows.shape), name, rows)


def _with_trained(rows: Tensor, trained_rows: Tensor, trained: Trained, module: str) -> Tensor:
    """`rows`, which come after the base's, with those in their place that were trained by themselves."""
    found = rows.float64().copy()
    for token, row in zip(trained.tokens[module], trained_rows.float64(), strict=True):
        if token >= trained.num_own[module]:
            found[token - trained.num_own[module]] = row
    return Tensor("F64", found)


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
