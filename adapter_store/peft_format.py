"""A PEFT adapter folder, read to what is served: per-module rank and scaling, and the factors as kernels want them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorafleet.adapter_store.base_weights import BaseWeights
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import (
    NUMPY_DTYPES,
    AdapterManifest,
    AdapterWeights,
    Array,
    BaseGeometry,
    ModuleManifest,
)
from lorafleet.adapter_store.peft_config import LoraSpec, read_config
from lorafleet.adapter_store.targets import effective_modules, tied_outputs
from lorafleet.adapter_store.tensor_file import TensorFile, tag_of, write_tensors
from lorafleet.adapter_store.tensors import SERVED, Tensor
from lorafleet.adapter_store.validation import (
    BaseCopy,
    MatchedTensors,
    check_base_copy,
    check_ranks,
    check_values,
    match_tensors,
    modules_present,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_VERSION_CHARS = 40


@dataclass(frozen=True, slots=True)
class AdapterReader:
    """Reads adapters for one base, and lets none pass that would not be served right."""

    geometry: BaseGeometry
    max_rank: int
    base_weights: BaseWeights | None = None
    """To compare copies of the base's weights with; without it, files that bring such copies are refused."""

    @property
    def max_weights_bytes(self) -> int:
        """No weights file of this base can be larger: the largest rank everywhere, copies of the base, in float64."""
        factors = sum(self.max_rank * (shape.in_dim + shape.out_dim) for shape in self.geometry.modules.values())
        copies = sum(
            shape.in_dim * shape.out_dim
            for name, shape in self.geometry.modules.items()
            if not any(part.isdigit() for part in name.split("."))
        )
        return 8 * (factors + copies) + 2**26

    def read(self, folder: Path) -> AdapterWeights:
        """Read, check and digest the adapter in `folder`. Raises AdapterRefused with the code of the broken rule."""
        self._check_files(folder)
        spec = read_config(folder / CONFIG_FILE)
        file = TensorFile.open(folder / WEIGHTS_FILE)
        modules = effective_modules(spec, self.geometry, present=modules_present(file.entries, self.geometry))
        check_ranks(modules, self.max_rank)
        matched = match_tensors(file.entries, modules, self.geometry)
        for copy in matched.base_copies:
            self._check_base_copy(file, copy)
        self._check_tying(spec, file, modules, matched)

        served = SERVED[self.geometry.dtype]
        digest = hashlib.sha256(b"lorafleet adapter 1")
        tensors: dict[str, tuple[Array, Array]] = {}
        for module in modules:
            a_name, b_name = matched.factors[module.name]
            a, b = file.read(a_name), file.read(b_name)
            _update(digest, module, a, b)
            a_array = check_values(a_name, a, served).array
            b_array = check_values(b_name, b, served).array
            # PEFT's B is (out_dim, rank), an embedding's A (rank, num_embeddings): transposed here and only here.
            is_embedding = self.geometry.modules[module.name].kind == "embedding"
            tensors[module.name] = (_frozen(a_array.T if is_embedding else a_array), _frozen(b_array.T))
        return AdapterWeights(
            self._manifest(digest.hexdigest()[:_VERSION_CHARS], modules), self.geometry.dtype, tensors
        )

    def drop_base_copies(self, folder: Path) -> None:
        """Rewrite the weights file of an adapter that `read` accepted without the base's own weights, if it has any."""
        file = TensorFile.open(folder / WEIGHTS_FILE)
        kept = [name for name in file.entries if ".lora_" in name]
        if len(kept) < len(file.entries):
            rewritten = folder / f"{WEIGHTS_FILE}.rewritten"
            write_tensors(rewritten, {name: file.read(name) for name in kept})
            rewritten.replace(file.path)

    def num_bytes(self, modules: tuple[ModuleManifest, ...]) -> int:
        """Bytes of these modules' factors in the served dtype."""
        shapes = self.geometry.modules
        elements = sum(m.rank * (shapes[m.name].in_dim + shapes[m.name].out_dim) for m in modules)
        return elements * np.dtype(NUMPY_DTYPES[self.geometry.dtype]).itemsize

    def _manifest(self, version: str, modules: tuple[ModuleManifest, ...]) -> AdapterManifest:
        return AdapterManifest(
            version=version,
            rank=max(module.rank for module in modules),
            targets=tuple(sorted({module.name.rpartition(".")[2] for module in modules})),
            modules=modules,
            num_bytes=self.num_bytes(modules),
        )

    def _check_files(self, folder: Path) -> None:
        present = {path.name for path in folder.iterdir()}
        if not present & {CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE}:
            raise AdapterRefused("empty_folder", f"there is neither {CONFIG_FILE} nor {WEIGHTS_FILE}")
        if CONFIG_FILE not in present:
            raise AdapterRefused("missing_config", f"there is no {CONFIG_FILE}")
        if WEIGHTS_FILE not in present:
            if PICKLE_FILE in present:
                raise AdapterRefused(
                    "pickle_weights", f"{PICKLE_FILE} is a pickle: save as {WEIGHTS_FILE}", PICKLE_FILE
                )
            raise AdapterRefused("missing_weights", f"there is no {WEIGHTS_FILE}")

    def _check_base_copy(self, file: TensorFile, copy: BaseCopy) -> None:
        if tag_of(file.entries[copy.tensor]) is None:
            message = f"tensor {copy.tensor} is of type {file.entries[copy.tensor].tag}"
            raise AdapterRefused("unsupported_dtype", message, copy.tensor)
        check_base_copy(copy, file.read(copy.tensor), self.base_weights, self.geometry)

    def _check_tying(
        self, spec: LoraSpec, file: TensorFile, modules: tuple[ModuleManifest, ...], matched: MatchedTensors
    ) -> None:
        """With ensure_weight_tying PEFT derives a tied output's factors from the embedding's: they must agree."""
        if not spec.ensure_weight_tying:
            return
        names = {module.name for module in modules}
        embeddings = {name for name in names if self.geometry.modules[name].kind == "embedding"}
        for output in tied_outputs(names, self.geometry) & names:
            a, b = (file.read(name).array for name in matched.factors[output])
            tied = any(
                np.array_equal(a, file.read(b_name).array.T) and np.array_equal(b, file.read(a_name).array.T)
                for a_name, b_name in (matched.factors[embedding] for embedding in embeddings)
            )
            if not tied:
                message = f"ensure_weight_tying is true, but {output} has other factors than the embedding"
                raise AdapterRefused("unsupported_field", message, "ensure_weight_tying")


def _update(digest: hashlib._Hash, module: ModuleManifest, a: Tensor, b: Tensor) -> None:
    """Only what is computed with counts: neither names of files nor the order of anything in them."""
    head = [module.name, module.rank, module.scaling.hex(), a.tag, list(a.shape), b.tag, list(b.shape)]
    digest.update(json.dumps(head).encode())
    digest.update(a.array.data)
    digest.update(b.array.data)


def _frozen(array: Array) -> Array:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array
