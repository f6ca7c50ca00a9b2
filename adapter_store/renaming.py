"""Names that transformers gives a checkpoint's weights on load: GPT-NeoX's `embed_out` becomes `lm_head`.

transformers' rules are imported at the first use: it takes seconds, and starting ingresses and controllers need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from lorafleet.adapter_store.manifest import BaseGeometry
from lorafleet.adapter_store.peft_config import LoraSpec

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightRenaming


def renamed(kinds: Sequence[str], name: str) -> str:
    """The name that a parameter of a checkpoint gets on load, by transformers' own rules for the first known kind.

    kinds: names of classes and model types, as in `BaseGeometry.kinds`.
    """
    from transformers.core_model_loading import rename_source_key

    new: str = rename_source_key(name, _renamings(tuple(kinds)), [])[0]
    return new


def with_loaded_names(spec: LoraSpec, geometry: BaseGeometry) -> LoraSpec:
    """The config with names of modules as they are after loading, where no module of the base has the name given."""
    parts = [f".{name}" for name in (*geometry.modules, *geometry.parameters)]

    def loaded(end: str) -> str:
        is_there = any(name.endswith(f".{end}") or f".{end}." in name for name in parts)
        new = renamed(geometry.kinds, f"{end}.weight").removesuffix(".weight")
        return new if not is_there and any(name.endswith(f".{new}") for name in parts) else end

    def loaded_all(ends: frozenset[str] | str) -> frozenset[str] | str:
        return ends if isinstance(ends, str) else frozenset(map(loaded, ends))

    if not _renamings(geometry.kinds):
        return spec
    return replace(
        spec,
        target_modules=loaded_all(spec.target_modules),
        exclude_modules=loaded_all(spec.exclude_modules),
        modules_to_save=frozenset(map(loaded, spec.modules_to_save)),
        token_indices={loaded(end): tokens for end, tokens in spec.token_indices.items()},
    )


@lru_cache(maxsize=64)
def _renamings(kinds: tuple[str, ...]) -> list[WeightRenaming]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    for kind in kinds:
        transforms = get_checkpoint_conversion_mapping(kind)
        if transforms is not None:
            return [transform for transform in transforms if type(transform) is WeightRenaming]
    return []
