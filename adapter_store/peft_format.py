"""A PEFT adapter folder, read to what is served: per-module rank and scaling, factors as kernels want them, extras."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from lorafleet.adapter_store.base_weights import BaseWeights, own_weight
from lorafleet.adapter_store.contents import (
    BaseCopy,
    Contents,
    is_left_out,
    is_pefts_name,
    match_tensors,
    modules_present,
)
from lorafleet.adapter_store.conversations import BaseTokens, keep_own_tokens, noted, read_chat
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.extras import read_extras
from lorafleet.adapter_store.manifest import (
    NUMPY_DTYPES,
    AdapterChat,
    AdapterManifest,
    AdapterWeights,
    Array,
    BaseGeometry,
    ExtraManifest,
    ModuleManifest,
    shared_modules,
)
from lorafleet.adapter_store.mixtures import by_expert, joined, transposed, with_parameters
from lorafleet.adapter_store.patterns import one_time_limit
from lorafleet.adapter_store.peft_config import LoraSpec, read_config, refuse_before
from lorafleet.adapter_store.renaming import renamed, with_loaded_names
from lorafleet.adapter_store.targets import (
    effective_modules,
    listed,
    tied_outputs,
    unmatched_parameters,
    unmatched_targets,
)
from lorafleet.adapter_store.tensor_file import TensorEntry, TensorFile, tag_of, write_tensors
from lorafleet.adapter_store.tensors import SERVED, Tensor
from lorafleet.adapter_store.token_rows import read_token_rows, with_tokens
from lorafleet.adapter_store.trained import TOKENS_FIELD, Trained, num_rows, trained
from lorafleet.adapter_store.validation import check_base_copy, check_products, check_ranks, check_values
from lorafleet.adapter_store.wrappers import PREFIX, pefts_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
INDEX_FILES = (f"{WEIGHTS_FILE}.index.json", "model.safetensors.index.json")
"""What transformers writes beside an adapter in shards; nothing reads them back."""
OTHER_WEIGHTS_FILES = (PICKLE_FILE, *INDEX_FILES)
"""In place of `WEIGHTS_FILE`: whether they are there, only the wording of a refusal depends on."""

_VERSION_CHARS = 40


@dataclass(frozen=True, slots=True)
class AdapterReader:
    """Reads adapters for one base, and lets none pass that would not be served right."""

    geometry: BaseGeometry
    max_rank: int
    base_weights: BaseWeights | None = None
    """To compare what files bring of the base's weights with; without it, such files are refused."""
    base_tokens: BaseTokens | None = None
    """To check tokenizers against; without it, chat templates and tokenizers are ignored."""

    @property
    def max_weights_bytes(self) -> int:
        """No weights file of this base can be larger: the largest rank everywhere, copies of the base, in float64."""
        modules = self.geometry.modules
        factors = sum(shape.num_elements(self.max_rank) for shape in modules.values())
        biases = sum(2 * shape.out_dim for shape in modules.values()) + 2 * sum(self.geometry.vectors.values())
        copies = sum(
            shape.in_dim * shape.out_dim
            for name, shape in modules.items()
            if not any(part.isdigit() for part in name.split("."))
        )
        return 8 * (factors + biases + copies) + 2**26

    def read(self, folder: Path, *, strict: bool = False) -> AdapterWeights:
        """Read, check and digest the adapter in `folder`. Raises AdapterRefused with the code of the broken rule.

        `strict` refuses a config that says what PEFT ignores; otherwise that is a warning.
        """
        plan = self._plan(folder, strict=strict)
        file, contents = plan.file, plan.contents
        for copy in contents.base_copies:
            self._check_base_copy(file, copy)
        for twin, first in contents.twins.items():
            if tag_of(file.entries[twin]) is None or not np.array_equal(file.read(twin).array, file.read(first).array):
                raise AdapterRefused("unmatched_tensor", f"tensor {twin} differs from {first}", twin)
        self._check_tying(plan)

        served = SERVED[self.geometry.dtype]
        digest = hashlib.sha256(b"lorafleet adapter 1")
        tensors: dict[str, tuple[Array, Array]] = {}
        idle: list[bool] = []
        for module in plan.lora:
            a_name, b_name = contents.names_of(module.name)
            a, b = self._factors(plan, module.name)
            _update(digest, module, a, b)
            idle.append(module.scaling == 0.0 or b.is_zero() or a.is_zero())
            a_array = check_values(a_name, a, served).array
            b_array = check_values(b_name, b, served).array
            check_products(module, a, b, served)
            # PEFT's B is (out_dim, rank), an embedding's A (rank, num_embeddings): transposed here and only here.
            is_embedding = self.geometry.modules[module.name].kind == "embedding"
            tensors[module.name] = (a_array.T if is_embedding else a_array, b_array.T)
        scalings = {module.name: module.scaling for module in plan.modules}
        for name, rows in read_token_rows(file, contents, plan.trained, self.base_weights, self.geometry).items():
            digest.update(rows.head)
            digest.update(rows.difference.data)
            factors = rows.factors(scalings[name], self.geometry.modules[name], served)
            tensors[name] = _beside(tensors.get(name), factors)
        extras: dict[str, Array] = {}
        manifests: list[ExtraManifest] = []
        for extra in read_extras(file, contents, scalings, plan.trained, self.base_weights, self.geometry):
            digest.update(extra.head)
            digest.update(extra.tensor.array.data)
            extras[extra.manifest.name] = check_values(extra.source, extra.tensor, served).array
            manifests.append(extra.manifest)
        if contents.vocabulary is not None:
            digest.update(json.dumps(["vocabulary", contents.vocabulary]).encode())
        if plan.spec.invocation:
            digest.update(json.dumps(["invocation", plan.spec.invocation]).encode())
        chat = self._chat(folder, plan)
        if chat is not None:
            own_tokens = [[astuple(token) for token in chat.own_tokens]] if chat.own_tokens else []
            digest.update(json.dumps(["chat", chat.template, chat.end_token_ids, *own_tokens]).encode())
        ignored = noted(folder, self.base_tokens)
        warnings = (*plan.warnings, *ignored, *_idle(plan, idle, bool(plan.trained.tokens or manifests)))
        manifest = self._manifest(digest.hexdigest()[:_VERSION_CHARS], plan, tuple(manifests), warnings)
        manifest = replace(manifest, chat=chat)
        return AdapterWeights.of(manifest, self.geometry.dtype, dict(sorted(tensors.items())), extras)

    def _chat(self, folder: Path, plan: _Plan) -> AdapterChat | None:
        return read_chat(folder, self.base_tokens, plan.contents.vocabulary or self._num_rows)

    @property
    def _num_rows(self) -> int:
        """Tokens that the base has rows of, be they in its tokenizer or not."""
        return min(
            (num_rows(shape) for shape in self.geometry.modules.values() if shape.kind == "embedding"), default=0
        )

    def _factors(self, plan: _Plan, module: str) -> tuple[Tensor, Tensor]:
        """A and B of a module, those of experts with an expert's ranks after another's."""
        shape, file = self.geometry.modules[module], plan.file
        if module in plan.contents.single_factors:
            parts = plan.contents.single_factors[module]
            a, b = joined([[(file.read(a), file.read(b)) for a, b in part] for part in parts])
        else:
            a, b = map(file.read, plan.contents.factors[module])
        if shape.kind != "experts":
            return a, b
        b = by_expert(b, shape.num_experts)
        return (transposed(b), transposed(a)) if shape.is_swapped else (a, b)

    def drop_base_copies(self, folder: Path) -> None:
        """Leave of an adapter that `read` accepted what is its own: of weights, and of files that were checked only."""
        plan = self._plan(folder)
        chat = self._chat(folder, plan)
        keep_own_tokens(folder, () if chat is None else chat.own_tokens)
        kept = plan.contents.served
        if len(kept) < len(plan.file.entries):
            rewritten = folder / f"{WEIGHTS_FILE}.rewritten"
            write_tensors(rewritten, {name: plan.file.read(name) for name in kept})
            rewritten.replace(plan.file.path)

    def num_bytes(self, modules: Iterable[ModuleManifest], extras: Iterable[ExtraManifest]) -> int:
        """Bytes of these modules' factors and these extras in the served dtype."""
        shapes = self.geometry.modules
        elements = sum(shapes[module.name].num_elements(module.rank) for module in modules)
        elements += sum(extra.num_rows * extra.width for extra in extras)
        return elements * np.dtype(NUMPY_DTYPES[self.geometry.dtype]).itemsize

    def _plan(self, folder: Path, *, strict: bool = False) -> _Plan:
        """Contents of the folder and their use. No tensor is read yet."""
        self._check_files(folder)
        spec = with_loaded_names(read_config(folder / CONFIG_FILE, strict=strict), self.geometry)
        file = TensorFile.open(folder / WEIGHTS_FILE)
        if not file.entries:
            raise AdapterRefused("missing_tensor", f"{WEIGHTS_FILE} has no tensors", WEIGHTS_FILE)
        with one_time_limit():
            spec = with_parameters(spec, self.geometry)
            kept = {name: entry for name, entry in file.entries.items() if not self._is_left_out(name)}
            num_left_out = len(file.entries) - len(kept)
            if not kept:
                message = f"{WEIGHTS_FILE} has tensors of towers of images or sound only, which are not served"
                raise AdapterRefused("no_module", message, WEIGHTS_FILE)
            file = replace(file, entries=self._named(kept))
            lora = effective_modules(spec, self.geometry, present=modules_present(file.entries, self.geometry))
            check_ranks(lora, self.max_rank, "r")
            embeddings = [module.name for module in lora if self.geometry.modules[module.name].kind == "embedding"]
            if spec.invocation and embeddings:
                message = f"alora_invocation_tokens is set, and LoRA is on the embedding {embeddings[0]}"
                raise AdapterRefused("unsupported_field", message, "alora_invocation_tokens")
            beside = trained(spec, self.geometry, {module.name for module in lora})
        modules = with_tokens(lora, beside.own_tokens)
        check_ranks(modules, self.max_rank, TOKENS_FIELD)
        contents = match_tensors(file.entries, spec, lora, beside, self.geometry)
        if spec.invocation and contents.biases:
            refuse_before(f"{next(iter(contents.biases.values()))} is a trained bias")
        if spec.invocation and contents.vocabulary is not None:
            refuse_before(f"the vocabulary has {contents.vocabulary} tokens, which is not the base's")
        warnings = [*spec.warnings]
        if num_left_out:
            warnings.append(f"{num_left_out} tensors of towers of images or sound are ignored: text alone is served")
        for field, absent in (
            ("target_modules", unmatched_targets(spec, self.geometry)),
            ("target_parameters", unmatched_parameters(spec, self.geometry)),
            ("modules_to_save", beside.unmatched),
        ):
            if absent and strict:
                message = f"{field} names no module of the base: {listed(absent)} (the source is strict)"
                raise AdapterRefused("unknown_target", message, field)
            if absent:
                warnings.append(f"{field} names what the base has no module of: {listed(absent)}")
        return _Plan(spec, file, lora, beside, modules, contents, tuple(warnings))

    def _is_left_out(self, name: str) -> bool:
        return is_left_out(name.removeprefix(PREFIX), self.geometry)

    def _named(self, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        """The tensors by the names that PEFT gives them on this base as transformers loads it."""

        def loaded(name: str) -> str:
            """`name` has no prefix."""
            return name if is_pefts_name(name, self.geometry) else renamed(self.geometry.kinds, name)

        names = pefts_names(entries, lambda name: is_pefts_name(loaded(name), self.geometry))
        found: dict[str, TensorEntry] = {}
        for name, entry in entries.items():
            prefix = PREFIX if names[name].startswith(PREFIX) else ""
            read = prefix + loaded(names[name].removeprefix(PREFIX))
            if read in found:
                raise AdapterRefused("unmatched_tensor", f"tensors {name[:200]} and another are both {read}", name)
            found[read] = entry
        return found

    def _manifest(
        self,
        version: str,
        plan: _Plan,
        extras: tuple[ExtraManifest, ...],
        warnings: tuple[str, ...],
    ) -> AdapterManifest:
        modules = plan.modules
        return AdapterManifest(
            version=version,
            rank=max(module.rank for module in modules),
            targets=tuple(sorted({module.name.rpartition(".")[2] for module in modules})),
            modules=shared_modules(modules),
            num_bytes=self.num_bytes(modules, extras),
            extras=extras,
            invocation=plan.spec.invocation,
            vocabulary=plan.contents.vocabulary,
            warnings=warnings,
        )

    def _check_files(self, folder: Path) -> None:
        present = {path.name for path in folder.iterdir()}
        if not present & {CONFIG_FILE, WEIGHTS_FILE, *OTHER_WEIGHTS_FILES}:
            raise AdapterRefused("empty_folder", f"there is neither {CONFIG_FILE} nor {WEIGHTS_FILE}", CONFIG_FILE)
        if CONFIG_FILE not in present:
            raise AdapterRefused(
                "missing_config", f"there is no {CONFIG_FILE}; PEFT's save_pretrained writes one", CONFIG_FILE
            )
        if WEIGHTS_FILE in present:
            return
        for name in sorted(present.intersection(INDEX_FILES)):
            message = f"{name} is an index of several weights files: save one {WEIGHTS_FILE}"
            raise AdapterRefused("sharded_weights", message, name)
        if PICKLE_FILE in present:
            raise AdapterRefused("pickle_weights", f"{PICKLE_FILE} is a pickle: save as {WEIGHTS_FILE}", PICKLE_FILE)
        raise AdapterRefused(
            "missing_weights", f"there is no {WEIGHTS_FILE}; PEFT's save_pretrained writes one", WEIGHTS_FILE
        )

    def _check_base_copy(self, file: TensorFile, copy: BaseCopy) -> None:
        if tag_of(file.entries[copy.tensor]) is None:
            message = f"tensor {copy.tensor} is of type {file.entries[copy.tensor].tag}"
            raise AdapterRefused("unsupported_dtype", message, copy.tensor)
        check_base_copy(copy, file.read(copy.tensor), self.base_weights, self.geometry)

    def _check_tying(self, plan: _Plan) -> None:
        """With ensure_weight_tying PEFT derives what a tied output has from the embedding's: they must agree."""
        if not plan.spec.ensure_weight_tying:
            return
        names = {module.name for module in plan.lora}
        for output in tied_outputs(names, self.geometry) & names:
            a, b = (plan.file.read(name).array for name in plan.contents.factors[output])
            factors = plan.contents.factors[self.geometry.tied[output]]
            embedding_a, embedding_b = (plan.file.read(name).array for name in factors)
            if not (np.array_equal(a, embedding_b.T) and np.array_equal(b, embedding_a.T)):
                _refuse_untied(output)
        for output, embedding in plan.trained.tied.items():
            of_output, of_embedding = (plan.contents.replaced[f"{module}.weight"] for module in (output, embedding))
            if not np.array_equal(plan.file.read(of_output).array, plan.file.read(of_embedding).array):
                _refuse_untied(output)
            if own_weight(self.base_weights, self.geometry, output, "bias") is not None:
                message = f"ensure_weight_tying is true, and {output} has a bias, which PEFT leaves out then"
                raise AdapterRefused("unsupported_field", message, "ensure_weight_tying")


@dataclass(frozen=True, slots=True)
class _Plan:
    """An adapter folder as its config and the header of its weights file describe it."""

    spec: LoraSpec
    file: TensorFile
    lora: tuple[ModuleManifest, ...]
    """Modules that have low-rank factors in the file."""
    trained: Trained
    modules: tuple[ModuleManifest, ...]
    """Modules that get low-rank factors: `lora` and those with trained tokens."""
    contents: Contents
    warnings: tuple[str, ...]


def _idle(plan: _Plan, idle: Sequence[bool], has_more: bool) -> Iterator[str]:
    """Says that LoRA, or the whole adapter, adds nothing."""
    if not all(idle):
        return
    why = "lora_alpha is 0" if all(module.scaling == 0.0 for module in plan.lora) else "every A @ B is 0"
    yield f"{why}: LoRA adds nothing" if has_more else f"{why}: the adapter answers as the base"


def _refuse_untied(output: str) -> NoReturn:
    message = f"ensure_weight_tying is true, but {output} has other weights than the embedding"
    raise AdapterRefused("unsupported_field", message, "ensure_weight_tying")


def _update(digest: hashlib._Hash, module: ModuleManifest, a: Tensor, b: Tensor) -> None:
    """Only what is computed with counts: neither names of files nor the order of anything in them."""
    head = [module.name, module.rank, module.scaling.hex(), a.tag, list(a.shape), b.tag, list(b.shape)]
    digest.update(json.dumps(head).encode())
    digest.update(a.array.data)
    digest.update(b.array.data)


def _beside(lora: tuple[Array, Array] | None, rows: tuple[Array, Array]) -> tuple[Array, Array]:
    """More ranks for a module; with LoRA on it, it is a linear one: both factors have their ranks in rows."""
    if lora is None:
        return rows
    return np.concatenate((lora[0], rows[0])), np.concatenate((lora[1], rows[1]))
