"""Every tensor of a weights file with its place: what it is of the adapter, or of the base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import BaseGeometry, ModuleManifest, ModuleShape, magnitude_of
from lorafleet.adapter_store.mixtures import OldNames, experts_of, old_names, single_modules, wrapper_of
from lorafleet.adapter_store.peft_config import LoraSpec
from lorafleet.adapter_store.targets import is_output, tied_outputs
from lorafleet.adapter_store.tensor_file import TensorEntry, tag_of
from lorafleet.adapter_store.trained import TOKENS_FIELD, Trained, norms
from lorafleet.adapter_store.wrappers import nearest, prefix_of

_LINEAR = (".lora_A.weight", ".lora_B.weight")
_FACTORS = {
    "linear": _LINEAR,
    "router": _LINEAR,
    "experts": _LINEAR,
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}
_BASE_ENDS = (
    ".token_adapter.base_layer.weight",
    ".base_layer.weight",
    ".base_layer.bias",
    ".original_module.weight",
    ".original_module.bias",
    ".weight",
    ".bias",
)
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_IDLE_OF_LORA = re.compile(r"(.+)\.lora_(?:velora_embed|monteclora_sampler\.\w+)")
"""What VeLoRA and MonteCLoRA keep for training on; PEFT answers without it."""
_IDLE_OF_MODULES = re.compile(r"(.+)\.(?:original_module|modules_to_save)\.bias")
"""Second copies, under `bias: all`, of the biases of modules that were trained as a whole; PEFT reads neither."""
_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Buffers that older models saved; they follow from the config, and transformers passes over them."""

MAX_ADDED_TOKENS = 4096

_ENDS_OF_MODULES = re.compile(
    r"\.lora_.*|\.token_adapter\..*|(\.base_layer|\.original_module|\.modules_to_save)?\.(weight|bias)$"
)
"""What follows a module's name in the names of a file."""


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A tensor of the file that is a weight of the base, not of the adapter."""

    tensor: str
    module: str
    leaf: str


@dataclass(frozen=True, slots=True)
class Contents:
    """Names of tensors by what they are for; all of them have been found in the file, in the right shape."""

    factors: Mapping[str, tuple[str, str]]
    """Module -> its A and B."""
    single_factors: Mapping[str, list[list[tuple[str, str]]]]
    """Experts -> A and B of each part, of each expert, where the file has them one by one."""
    lora_biases: Mapping[str, str]
    """Linear module -> the bias on its B."""
    magnitudes: Mapping[str, str]
    """Module -> DoRA's magnitudes of its outputs."""
    biases: Mapping[str, str]
    """Linear module -> its own bias, trained."""
    replaced: Mapping[str, str]
    """Parameter of the base -> what takes its place."""
    token_rows: Mapping[str, str]
    """Embedding or output -> its trained rows."""
    resized: Mapping[str, str]
    """Embedding or output -> its matrix, trained or not, where the vocabulary is not the base's; then all have one."""
    vocabulary: int | None
    """How many tokens there are then; None: as many as the base has."""
    base_copies: tuple[BaseCopy, ...]
    twins: Mapping[str, str]
    """Second copy of a module that was trained as a whole -> the first; PEFT reads one of them."""

    def names_of(self, module: str) -> tuple[str, str]:
        """Names of a module's A and B; of the first of them where it has several."""
        return self.factors.get(module) or self.single_factors[module][0][0]

    def token_rows_of(self, module: str, trained: Trained) -> str:
        """Name of the trained rows of a module in `trained.tokens`."""
        return self.token_rows[trained.token_source.get(module, module)]

    @property
    def served(self) -> frozenset[str]:
        """All that the adapter needs of the file."""
        one_each = (self.lora_biases, self.magnitudes, self.biases, self.replaced, self.token_rows, self.resized)
        names = [name for places in one_each for name in places.values()]
        names += [name for parts in self.single_factors.values() for part in parts for pair in part for name in pair]
        return frozenset(names).union(*self.factors.values())


def is_pefts_name(name: str, geometry: BaseGeometry) -> bool:
    """Return True if a name without PEFT's prefix belongs to a module or a parameter of this base."""
    if name in geometry.parameters or name in geometry.vectors:
        return True
    ends = _ENDS_OF_MODULES.search(name)
    if ends is None:
        return False
    owner = name[: ends.start()]
    return owner in geometry.modules or f"{owner}.weight" in geometry.vectors or owner in _experts_names(geometry)


def is_left_out(name: str, geometry: BaseGeometry) -> bool:
    """Return True for a tensor of a tower that is not served; `name` is without PEFT's prefix."""
    ends = _ENDS_OF_MODULES.search(name) if geometry.left_out else None
    return ends is not None and name[: ends.start()] in geometry.left_out


@lru_cache(maxsize=16)
def _names_of_experts(experts: tuple[tuple[str, int], ...], old: OldNames | None) -> frozenset[str]:
    wrappers = {
        owner + ".base_layer" * depth
        for owner, parameters in experts_of(name for name, _ in experts).items()
        for depth in range(len(parameters))
    }
    single = [single_modules(name, count, old) for name, count in experts] if old else []
    return frozenset(wrappers.union(*(part for parts in single for part in parts)))


def _experts_names(geometry: BaseGeometry) -> frozenset[str]:
    """Names that may stand before LoRA's in those of experts' factors."""
    experts = [(name, shape.num_experts) for name, shape in geometry.modules.items() if shape.kind == "experts"]
    return _names_of_experts(tuple(experts), old_names(geometry)) if experts else frozenset()


def modules_present(entries: Mapping[str, TensorEntry], geometry: BaseGeometry) -> set[str]:
    """Modules of the base for which a file has both factors."""
    prefix = prefix_of(entries)
    return {
        name
        for name, shape in geometry.modules.items()
        if all(key in entries for key in _factor_names(prefix, name, shape.kind))
    }


def match_tensors(
    entries: Mapping[str, TensorEntry],
    spec: LoraSpec,
    modules: Sequence[ModuleManifest],
    trained: Trained,
    geometry: BaseGeometry,
) -> Contents:
    """Give every tensor its place.

    Rules `missing_tensor`, `wrong_shape`, `vocabulary_resized`, `unsupported_dtype`, `unmatched_tensor`.
    """
    return _Matching(entries, spec, modules, trained, geometry).contents()


def _factor_names(prefix: str, module: str, kind: str = "linear") -> tuple[str, str]:
    a_end, b_end = _FACTORS[kind]
    return f"{prefix}{module}{a_end}", f"{prefix}{module}{b_end}"


class _Matching:
    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        spec: LoraSpec,
        modules: Sequence[ModuleManifest],
        trained: Trained,
        geometry: BaseGeometry,
    ) -> None:
        self._entries = entries
        self._spec = spec
        self._modules = modules
        self._lora = {module.name for module in modules}
        self._trained = trained
        self._geometry = geometry
        self._prefix = prefix_of(entries)
        self._resized: dict[str, str] = {}
        self._twins: dict[str, str] = {}
        self._single_factors: dict[str, list[list[tuple[str, str]]]] = {}
        self._vocabularies = {shape.in_dim for shape in geometry.modules.values() if shape.kind == "embedding"}

    def contents(self) -> Contents:
        factors = dict(self._factors())
        lora_biases = dict(self._lora_biases()) if self._spec.lora_bias else {}
        magnitudes = dict(self._magnitudes()) if self._spec.use_dora else {}
        replaced = dict(self._replaced())
        token_rows = dict(self._token_rows())
        one_each = (lora_biases, magnitudes, replaced, token_rows)
        placed = {name for places in one_each for name in places.values()}.union(*factors.values())
        placed.update(
            name for parts in self._single_factors.values() for part in parts for pair in part for name in pair
        )
        biases: dict[str, str] = {}
        copies: list[BaseCopy] = []
        for name in self._entries:
            if name in placed:
                continue
            parameter = self._trained_bias(name)
            if parameter is None:
                copies += self._left_over(name)
            elif parameter in self._geometry.vectors:
                replaced[parameter] = self._checked(name, (self._geometry.vectors[parameter],), parameter)
            else:
                module = parameter.removesuffix(".bias")
                biases[module] = self._checked(name, (self._geometry.modules[module].out_dim,), module)
        resized, vocabulary = self._all_resized()
        self._check_tokens(vocabulary)
        return Contents(
            factors,
            self._single_factors,
            lora_biases,
            magnitudes,
            biases,
            replaced,
            token_rows,
            resized,
            vocabulary,
            tuple(copies),
            self._twins,
        )

    def _factors(self) -> Iterator[tuple[str, tuple[str, str]]]:
        shapes = self._geometry.modules
        in_order = [name for name in shapes if name in self._lora and shapes[name].kind == "experts"]
        together = experts_of(iter(in_order))
        for module in self._modules:
            shape, owner = shapes[module.name], module.name
            if shape.kind == "experts":
                if self._has_single_factors(module, shape):
                    continue
                owner = wrapper_of(owner, together[owner.rpartition(".")[0]])
            a, b = _factor_names(self._prefix, owner, shape.kind)
            num_rows = module.rank * shape.num_experts
            of_a, of_b = (shape.out_dim, shape.in_dim) if shape.is_swapped else (shape.in_dim, shape.out_dim)
            self._checked(a, (num_rows, of_a), module.name)
            self._checked(b, (of_b, num_rows), module.name)
            yield module.name, (a, b)

    def _has_single_factors(self, module: ModuleManifest, shape: ModuleShape) -> bool:
        """Note the factors of a parameter of experts where the file has them by expert."""
        old = old_names(self._geometry)
        parts = single_modules(module.name, shape.num_experts, old) if old else []
        if not parts or _factor_names(self._prefix, parts[0][0])[0] not in self._entries:
            return False
        found = [[_factor_names(self._prefix, name) for name in part] for part in parts]
        for part, names in zip(parts, found, strict=True):
            for owner, (a, b) in zip(part, names, strict=True):
                self._checked(a, (module.rank // len(parts), shape.in_dim), owner)
                self._checked(b, (shape.out_dim // len(parts), module.rank // len(parts)), owner)
        self._single_factors[module.name] = found
        return True

    def _lora_biases(self) -> Iterator[tuple[str, str]]:
        for module in sorted(self._lora):
            shape = self._geometry.modules[module]
            if shape.kind == "embedding":
                message = f"lora_bias is true, and LoRA is on the embedding {module}, where PEFT has no such bias"
                raise AdapterRefused("unsupported_field", message, "lora_bias")
            yield module, self._checked(f"{self._prefix}{module}.lora_B.bias", (shape.out_dim,), module)

    def _magnitudes(self) -> Iterator[tuple[str, str]]:
        tied = tied_outputs(self._lora, self._geometry) if self._spec.ensure_weight_tying else set()
        for module in sorted(self._lora):
            if module in self._trained.tokens or module in tied:
                field = "ensure_weight_tying" if module in tied else TOKENS_FIELD
                raise AdapterRefused("unsupported_field", f"use_dora and {field} are both on {module}", "use_dora")
            name = f"{self._prefix}{magnitude_of(module)}"
            yield module, self._checked(name, (self._geometry.modules[module].out_dim,), module)

    def _replaced(self) -> Iterator[tuple[str, str]]:
        whole = self._trained.modules
        for parameter, width in self._geometry.vectors.items():
            if parameter.rpartition(".")[0] in whole:
                yield parameter, self._checked(f"{self._prefix}{parameter}", (width,), parameter)
        for module in sorted(whole - norms(self._geometry)):
            if self._is_resized(self._trained_name(module), module):
                continue
            yield f"{module}.weight", self._checked(f"{self._prefix}{module}.weight", self._matrix(module), module)

    def _token_rows(self) -> Iterator[tuple[str, str]]:
        for module, tokens in self._trained.tokens.items():
            if module not in self._trained.token_source:
                name = f"{self._prefix}{module}{_TOKEN_ROWS}"
                yield module, self._checked(name, (len(tokens), self._matrix(module)[1]), module)

    def _trained_bias(self, name: str) -> str | None:
        """The base's parameter in whose place PEFT loads this one; None if it is no trained bias."""
        name = name.removeprefix(self._prefix)
        wrapped = name.removesuffix(".base_layer.bias")
        if wrapped != name:
            is_linear = wrapped in self._lora and self._geometry.modules[wrapped].kind == "linear"
            return f"{wrapped}.bias" if is_linear and self._spec.bias != "none" else None
        module = name.removesuffix(".bias")
        if module == name or module in self._lora:
            return None
        if module in self._trained.modules:  # a norm's is among the replaced already
            return name if module in self._geometry.modules else None
        shape = self._geometry.modules.get(module)
        known = name in self._geometry.vectors or (shape is not None and shape.kind == "linear")
        return name if known and self._spec.bias == "all" else None

    def _left_over(self, tensor: str) -> Iterator[BaseCopy]:
        """A copy of the base's, or nothing that is computed with."""
        name = tensor.removeprefix(self._prefix)
        if name.endswith(_DERIVED):
            return
        for idle, owners in ((_IDLE_OF_LORA, self._lora), (_IDLE_OF_MODULES, self._trained.modules)):
            match = idle.fullmatch(name)
            if match and match[1] in owners:
                return
        with_rows = name.removesuffix(_TOKEN_ROWS)
        if with_rows != name and with_rows in self._trained.token_source:  # PEFT writes those of a tied output, too
            self._twins[tensor] = f"{self._prefix}{self._trained.token_source[with_rows]}{_TOKEN_ROWS}"
            return
        saved = name.removesuffix(".modules_to_save.weight")
        if saved != name and saved in self._trained.modules and self._trained_name(saved) in self._entries:
            self._twins[tensor] = self._trained_name(saved)
            return
        for end in _BASE_ENDS:
            module, leaf = name.removesuffix(end), end.rpartition(".")[2]
            if module != name and module in self._geometry.modules:
                if leaf == "weight":
                    if end.startswith(".original_module") and self._is_resized(self._trained_name(module), module):
                        return  # what was resized before it was trained
                    if self._is_resized(tensor, module):
                        return
                    self._refuse_resized(tensor, self._matrix(module))
                yield BaseCopy(tensor, module, leaf)
                return
            if module != name and f"{module}.{leaf}" in self._geometry.parameters:
                yield BaseCopy(tensor, module, leaf)
                return
        if name in self._geometry.parameters:
            yield BaseCopy(tensor, *name.rpartition(".")[::2])
            return
        message = f"tensor {tensor[:200]} belongs to nothing that the adapter trains, and is {self._what(name)}"
        raise AdapterRefused("unmatched_tensor", message, tensor[:200])

    def _what(self, name: str) -> str:
        """Describe a tensor that has no place, for a refusal."""
        match = _ENDS_OF_MODULES.search(name)
        owner = name[: match.start()] if match else name
        if owner in self._geometry.modules:
            return f"no weight of the base: {owner} is there, but the config does not ask for this of it"
        if any(parameter.startswith(f"{owner}.") for parameter in self._geometry.parameters):
            return f"of {owner}, which is not one that an adapter can change here"
        return f"no weight of the base, which has no {owner[:200]}"

    def _trained_name(self, module: str) -> str:
        return f"{self._prefix}{module}.weight"

    def _is_resized(self, tensor: str, module: str) -> bool:
        """Note a matrix of an embedding or an output that has another number of tokens than the base's."""
        entry, shape = self._entries.get(tensor), self._geometry.modules[module]
        if entry is None or len(entry.shape) != 2 or not (shape.kind == "embedding" or self._is_output(module)):
            return False
        (num_tokens, width), (own_tokens, own_width) = entry.shape, self._matrix(module)
        if width != own_width or num_tokens in (0, own_tokens):
            return False
        if num_tokens > own_tokens + MAX_ADDED_TOKENS:
            message = f"tensor {tensor} has {num_tokens} tokens, more than {MAX_ADDED_TOKENS} beyond the base's"
            raise AdapterRefused("vocabulary_resized", message, tensor)
        if tag_of(entry) is None:
            raise AdapterRefused("unsupported_dtype", f"tensor {tensor} is of type {entry.tag}", tensor)
        if self._resized.setdefault(module, tensor) != tensor:
            raise AdapterRefused("unmatched_tensor", f"tensor {tensor} is a second matrix of {module}", tensor)
        return True

    def _all_resized(self) -> tuple[dict[str, str], int | None]:
        """Every embedding and output with its matrix, and how many tokens these have, if not as many as the base."""
        if not self._resized:
            return {}, None
        tensor = next(iter(self._resized.values()))
        (num_tokens, _) = self._entries[tensor].shape
        modules = self._geometry.modules
        tied = self._geometry.tied
        counterpart = {**tied} | {embedding: output for output, embedding in tied.items()}
        found: dict[str, str] = {}
        kinds = set()
        for module, shape in modules.items():
            if shape.kind != "embedding" and not self._is_output(module):
                continue
            name = self._resized.get(module)
            if name is None and counterpart.get(module) not in self._trained.modules:
                name = self._resized.get(counterpart.get(module, ""))
            if name is None or self._entries[name].shape[0] != num_tokens:
                message = f"tensor {tensor} has {num_tokens} tokens, and the file has not as many rows of {module}"
                raise AdapterRefused("vocabulary_resized", message, tensor)
            found[module] = name
            kinds.add(shape.kind)
        biases = [module for module in found if f"{module}.bias" in self._geometry.parameters]
        if len(kinds) < 2 or biases or self._spec.ensure_weight_tying:
            why = f"tensor {tensor} has {num_tokens} tokens, which are not served together with "
            why += "ensure_weight_tying, or an output that has a bias or is none here"
            raise AdapterRefused("vocabulary_resized", why, tensor)
        return found, num_tokens

    def _check_tokens(self, vocabulary: int | None) -> None:
        """Rule `vocabulary_resized`: a token was trained that there is no row of."""
        for module, tokens in self._trained.tokens.items():
            if max(tokens) >= (vocabulary or self._trained.num_own[module]):
                message = (
                    f"{TOKENS_FIELD} has token {max(tokens)}, and {module} has rows of "
                    f"{vocabulary or self._trained.num_own[module]} tokens: save the resized matrices too "
                    "(save_embedding_layers=True)"
                )
                raise AdapterRefused("vocabulary_resized", message, TOKENS_FIELD)

    def _is_output(self, module: str) -> bool:
        return is_output(module, self._geometry.modules[module], self._geometry)

    def _matrix(self, module: str) -> tuple[int, int]:
        """Shape of the weight of an embedding or an output: a row a token."""
        shape = self._geometry.modules[module]
        return (shape.in_dim, shape.out_dim) if shape.kind == "embedding" else (shape.out_dim, shape.in_dim)

    def _checked(self, name: str, shape: tuple[int, ...], owner: str) -> str:
        if name not in self._entries:
            message = f"{owner} is trained, but there is no tensor {name}"
            message += f"; the nearest in the file is {nearest(name, self._entries)[:200]}"
            raise AdapterRefused("missing_tensor", message, name)
        entry = self._entries[name]
        self._refuse_resized(name, shape)
        if entry.shape != shape:
            message = f"tensor {name} has shape {list(entry.shape)}: the base and the rank make it {list(shape)}"
            raise AdapterRefused("wrong_shape", message, name)
        if tag_of(entry) is None:
            raise AdapterRefused("unsupported_dtype", f"tensor {name} is of type {entry.tag}", name)
        return name

    def _refuse_resized(self, name: str, shape: tuple[int, ...]) -> None:
        """Rule `vocabulary_resized`: the tensor differs from `shape` only in how many tokens there are."""
        found = self._entries[name].shape
        if len(found) == len(shape) and found != shape:
            for size, wanted in zip(found, shape, strict=True):
                if size != wanted and wanted not in self._vocabularies:
                    return
            message = f"tensor {name} has shape {list(found)}: the base's vocabulary makes it {list(shape)}"
            raise AdapterRefused("vocabulary_resized", f"{message}, and tokens cannot be added", name)
