"""Trained rows of an embedding or an output as low-rank factors: one rank a token, exact, beside LoRA or alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorafleet.adapter_store.base_weights import BaseWeights, own_weight
from lorafleet.adapter_store.contents import Contents
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import Array, BaseGeometry, ModuleManifest, ModuleShape, shared_module
from lorafleet.adapter_store.tensor_file import TensorFile
from lorafleet.adapter_store.tensors import FloatTag, Tensor
from lorafleet.adapter_store.trained import TOKENS_FIELD, Trained, num_rows
from lorafleet.adapter_store.validation import check_values


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Differences that are added to rows of one module's weight."""

    module: str
    tensor: str
    """Where the file has the trained rows."""
    tokens: tuple[int, ...]
    difference: npt.NDArray[np.float64]
    """(len(tokens), width): the trained rows less the base's."""

    @property
    def head(self) -> bytes:
        """Properties that a digest must cover beside the difference."""
        return json.dumps([self.module, "tokens", self.tokens, self.difference.shape]).encode()

    def factors(self, scaling: float, shape: ModuleShape, served: FloatTag) -> tuple[Array, Array]:
        """A and B as `AdapterWeights` holds them, so that scaling * B @ A is the difference.

        One of them picks the tokens, the other has their rows, divided by the scaling: that is where it is rounded.
        """
        rows = check_values(self.tensor, Tensor("F64", self.difference / scaling), served).array
        picked = np.zeros((len(self.tokens), num_rows(shape)), np.float32)
        picked[np.arange(len(self.tokens)), self.tokens] = 1.0
        picks = Tensor("F32", picked).to(served).array
        return (picks.T, rows) if shape.kind == "embedding" else (rows, picks)


def with_tokens(modules: Iterable[ModuleManifest], tokens: Mapping[str, Sequence[int]]) -> tuple[ModuleManifest, ...]:
    """Modules that LoRA is on, and those with trained tokens; where both are, their ranks add up. Sorted by name.

    Raises AdapterRefused `unsupported_field` for a scaling of 0, which would undo the tokens too.
    """
    merged = {module.name: module for module in modules}
    for name, trained in tokens.items():
        lora = merged.get(name, shared_module(name, 0, 1.0))
        if lora.scaling == 0.0:
            message = f"lora_alpha is 0 on {name}, which has trained tokens too"
            raise AdapterRefused("unsupported_field", message, "lora_alpha")
        merged[name] = shared_module(name, lora.rank + len(trained), lora.scaling)
    return tuple(merged[name] for name in sorted(merged))


def read_token_rows(
    file: TensorFile, contents: Contents, trained: Trained, base: BaseWeights | None, geometry: BaseGeometry
) -> dict[str, TokenRows]:
    """The trained rows of every module in `trained.own_tokens`.

    Raises AdapterRefused `base_weights_unverified`, and `unsupported_field` for an output with a bias.
    """
    rows: dict[str, TokenRows] = {}
    for module, tokens in sorted(trained.own_tokens.items()):
        name = contents.token_rows_of(module, trained)
        own = own_weight(base, geometry, module, "weight", tokens)
        if own is None:
            message = f"tensor {name} has rows of {module}, and the base's own are not at hand to compare them with"
            raise AdapterRefused("base_weights_unverified", message, name)
        if geometry.modules[module].kind == "linear" and own_weight(base, geometry, module, "bias") is not None:
            message = f"{TOKENS_FIELD} is on {module}, which has a bias, and there PEFT leaves the bias out"
            raise AdapterRefused("unsupported_field", message, TOKENS_FIELD)
        places = [place for place, token in enumerate(trained.tokens[module]) if token < trained.num_own[module]]
        difference = check_values(name, file.read(name), "F64").float64()[places] - own.float64()
        rows[module] = TokenRows(module, name, tokens, difference)
    return rows
