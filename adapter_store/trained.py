"""Finds the base's modules and tokens that an adapter replaces: PEFT's rules over module names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import BaseGeometry, ModuleShape
from lorafleet.adapter_store.peft_config import INPUT_EMBEDDING, LoraSpec
from lorafleet.adapter_store.targets import is_output

TOKENS_FIELD = "trainable_token_indices"
_EMBEDDING_NAMES = frozenset({"embed_tokens", "lm_head"})
"""The names by which PEFT knows what may be tied."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Modules and tokens that a config trains beside LoRA. No module is both in `modules` and in `tokens`."""

    modules: frozenset[str]
    """Embeddings, outputs and norms that were trained as a whole."""
    tied: Mapping[str, str]
    """Of `modules`, an output -> the embedding whose matrix it was trained to share."""
    tokens: Mapping[str, tuple[int, ...]]
    """Embedding or output -> the tokens whose rows were trained, in their order in the file."""
    token_source: Mapping[str, str]
    """An output in `tokens` -> the embedding whose trained rows are also its own."""
    unmatched: tuple[str, ...]
    """Names in modules_to_save that no module of the base ends in; PEFT passes over them."""
    num_own: Mapping[str, int]
    """Of each module in `tokens`, how many rows the base has."""

    @property
    def own_tokens(self) -> dict[str, tuple[int, ...]]:
        """Of `tokens`, those that the base has rows of."""
        found = {name: tuple(t for t in tokens if t < self.num_own[name]) for name, tokens in self.tokens.items()}
        return {name: tokens for name, tokens in found.items() if tokens}


def trained(spec: LoraSpec, geometry: BaseGeometry, lora: Collection[str]) -> Trained:
    """Judge modules_to_save and trainable_token_indices; `lora` are the modules with low-rank factors.

    Raises AdapterRefused `unsupported_field`, naming the field.
    """
    known = _known(geometry)
    modules = {module for end in sorted(spec.modules_to_save) for module in _saved(end, known, geometry)}
    unmatched = tuple(end for end in sorted(spec.modules_to_save) if not _ending_in(end, known))
    tied = _tied_modules(spec, geometry)
    modules |= {*tied.keys(), *tied.values()}
    tokens, token_source = _tokens(spec, known, geometry)
    for module in sorted(modules.intersection(lora)):
        _refuse("modules_to_save", f"modules_to_save and LoRA are both on {module}")
    for module in sorted(tokens):
        if module in modules:
            _refuse(TOKENS_FIELD, f"{TOKENS_FIELD} and modules_to_save are both on {module}")
        if module in lora and module not in token_source:
            _refuse(TOKENS_FIELD, f"{TOKENS_FIELD} and LoRA are both on {module}")
    num_own = {module: num_rows(geometry.modules[module]) for module in tokens}
    return Trained(frozenset(modules), tied, tokens, token_source, unmatched, num_own)


def num_rows(shape: ModuleShape) -> int:
    """Return the tokens that an embedding or an output has rows of."""
    return shape.in_dim if shape.kind == "embedding" else shape.out_dim


def norms(geometry: BaseGeometry) -> set[str]:
    """The norms that an adapter may replace."""
    return {parameter.rpartition(".")[0] for parameter in geometry.vectors}


def _saved(end: str, known: Collection[str], geometry: BaseGeometry) -> Iterator[str]:
    replaceable = norms(geometry)
    for module in _ending_in(end, known):
        if module not in replaceable and not _has_tokens(module, geometry):
            _refuse(
                "modules_to_save",
                f"modules_to_save names {end}, and so {module}: only the embedding, the output and norms are replaced",
            )
        yield module


def _known(geometry: BaseGeometry) -> set[str]:
    """Names of the modules that have parameters, and of all that these are within."""
    modules = {name for name, shape in geometry.modules.items() if shape.kind != "experts"}
    known = {*modules, *norms(geometry), *(name.rpartition(".")[0] for name in geometry.parameters)}
    for name in list(known):
        while name := name.rpartition(".")[0]:
            known.add(name)
    return known


def _ending_in(end: str, known: Collection[str]) -> list[str]:
    """PEFT's rule: any module, of whatever kind, whose name ends so, be it in the midst of a part of the name."""
    return sorted(name for name in known if name.endswith(end))


def _has_tokens(module: str, geometry: BaseGeometry) -> bool:
    """Return True if the module's rows are the vocabulary's: an embedding or an output."""
    shape = geometry.modules.get(module)
    return shape is not None and (shape.kind == "embedding" or is_output(module, shape, geometry))


def _tied_modules(spec: LoraSpec, geometry: BaseGeometry) -> dict[str, str]:
    if not spec.ensure_weight_tying or not any(
        end.rpartition(".")[2] in _EMBEDDING_NAMES for end in spec.modules_to_save
    ):
        return {}
    return {output: embedding for output, embedding in geometry.tied.items() if embedding in geometry.modules}


def _tokens(
    spec: LoraSpec, known: Collection[str], geometry: BaseGeometry
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    tokens: dict[str, tuple[int, ...]] = {}
    for end, indices in spec.token_indices.items():
        matched = [_input_embedding(geometry)] if end == INPUT_EMBEDDING else _ending_in(end, known)
        if not matched:
            _refuse(TOKENS_FIELD, f"{TOKENS_FIELD} names {end[:200]}: the base has no such module")
        for module in matched:
            if not _has_tokens(module, geometry):
                _refuse(TOKENS_FIELD, f"{TOKENS_FIELD} names {end}, and so {module}, which has no rows of tokens")
            if tokens.setdefault(module, indices) != indices:
                _refuse(TOKENS_FIELD, f"{TOKENS_FIELD} names {module} twice")
    source: dict[str, str] = {}
    for output, embedding in geometry.tied.items():
        # PEFT ties the rows of a tied output to those of the embedding unless both are given and differ.
        if embedding in tokens and tokens.get(output, tokens[embedding]) == tokens[embedding]:
            tokens[output], source[output] = tokens[embedding], embedding
        elif embedding in tokens and spec.ensure_weight_tying:
            _refuse(TOKENS_FIELD, f"ensure_weight_tying is true, but {TOKENS_FIELD} has other tokens for {output}")
    return tokens, source


def _input_embedding(geometry: BaseGeometry) -> str:
    embeddings = [name for name, shape in geometry.modules.items() if shape.kind == "embedding"]
    if len(embeddings) != 1:
        _refuse(
            TOKENS_FIELD, f"{TOKENS_FIELD} names no module, and the base's embedding is none that adapters may change"
        )
    return embeddings[0]


def _refuse(field: str, message: str) -> NoReturn:
    raise AdapterRefused("unsupported_field", message, field)
