"""Names of tensors as wrappers of a model leave them, read back to the names that PEFT itself writes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping

from lorafleet.adapter_store.errors import AdapterRefused

PREFIX = "base_model.model."
"""What PEFT puts before the base's names."""

_ALWAYS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts that torch.compile, FSDP and activation checkpointing put between others; no model has such a module."""

_SOMETIMES = ("module", "language_model", "thinker", "text_model", "llm")
"""Parts that a wrapper or a multimodal model puts before a decoder's, and that may be a module's own name too."""

_ADAPTER_NAME = re.compile(
    r"(?P<head>.*\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta))"
    r"\.(?P<name>(?!weight$|bias$)[^.]+)(?P<leaf>\.weight|\.bias)?"
)
_SAVED_NAME = re.compile(r"(?P<head>.*)\.modules_to_save\.(?P<name>(?!weight$|bias$)[^.]+)(?P<leaf>\.weight|\.bias)")

Reading = Mapping[str, str]
"""Name in the file -> PEFT's name."""


def pefts_names(names: Collection[str], is_known: Callable[[str], bool]) -> Reading:
    """The reading of a file's names under which `is_known` holds for all of them, without `PREFIX`.

    Names that are PEFT's already stay as they are, and so do all if no reading, or more than one, fits every name.
    """
    plain = {name: name for name in names}

    def fit(read: Collection[str]) -> bool:
        return all(_unnamed(name)[1] is None and is_known(name.removeprefix(PREFIX)) for name in read)

    if fit(names):
        return plain
    fitting: list[Reading] = []
    for reading in _readings(names):
        is_unique = len(set(reading.values())) == len(reading)
        if is_unique and reading not in fitting and fit(reading.values()):
            fitting.append(reading)
    return fitting[0] if len(fitting) == 1 else plain


def nearest(wanted: str, names: Collection[str]) -> str:
    """The name in a file that shares most of its last parts with `wanted`, and then most of its first ones."""
    parts = wanted.split(".")

    def likeness(name: str) -> tuple[int, int]:
        others = name.split(".")
        return _num_alike(parts[::-1], others[::-1]), _num_alike(parts, others)

    return max(sorted(names), key=likeness)


def prefix_of(names: Collection[str]) -> str:
    """Return the prefix of the base's names in a file: PEFT's own, or none.

    Raises AdapterRefused `unmatched_tensor` for a file that has names of both kinds.
    """
    bare = [name for name in names if not name.startswith(PREFIX)]
    if 0 < len(bare) < len(names):
        message = f"tensor {bare[0][:200]} lacks the {PREFIX} that other names begin with"
        raise AdapterRefused("unmatched_tensor", message, bare[0][:200])
    return "" if bare else PREFIX


def _readings(names: Collection[str]) -> Iterator[Reading]:
    cleaned = {name: _unnamed(".".join(part for part in name.split(".") if part not in _ALWAYS)) for name in names}
    adapters = {adapter for _, adapter in cleaned.values() if adapter}
    if len(adapters) > 1:
        return
    present = {part for name, _ in cleaned.values() for part in name.split(".")}
    optional = [part for part in _SOMETIMES if part in present]
    for count in range(len(optional) + 1):
        for dropped in itertools.combinations(optional, count):
            yield {name: _without(clean, dropped) for name, (clean, _) in cleaned.items()}


def _without(name: str, dropped: Collection[str]) -> str:
    """The name without these parts, and with PEFT's prefix once and first if it has it more often or later."""
    name = ".".join(part for part in name.split(".") if part not in dropped)
    _, prefix, rest = f".{name}".rpartition(f".{PREFIX}")
    return PREFIX + rest if prefix else name


def _unnamed(name: str) -> tuple[str, str | None]:
    """A name without the adapter's name that PEFT's live modules have in it, and that one."""
    for pattern in (_ADAPTER_NAME, _SAVED_NAME):
        match = pattern.fullmatch(name)
        if match:
            return match["head"] + (match["leaf"] or ""), match["name"]
    return name, None


def _num_alike(one: list[str], other: list[str]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
