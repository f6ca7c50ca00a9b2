"""`adapter_config.json` of PEFT: every field of LoraConfig is taken into account, harmless, or refused by its name.

Written against the fields of PEFT 0.21 and open to older and newer ones: a field that is not known here is refused
unless it is null, false or empty, which is how PEFT spells "off".
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lorafleet.adapter_store.errors import AdapterRefused

MAX_CONFIG_BYTES = 4 * 2**20

HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",  # training only
        "peft_version",
        "revision",
        "runtime_config",
        "megatron_core",  # read with megatron_config only
        "qalora_group_size",  # read with use_qalora only
        # LoRA's delta is the same however the base stores its weight; PEFT needs it for merging.
        "fan_in_fan_out",
        # Read with their own init_lora_weights only, which is judged by itself.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
    }
)
"""Fields that do not change what an adapter computes once it is trained."""

EFFECTIVE = frozenset(
    {
        "alpha_pattern",
        "ensure_weight_tying",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Fields that are read."""

REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "bias": "trained biases",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias on B",
    "megatron_config": "Megatron layers",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
"""Fields that change the computation in a way that is not served, in words; they must be off."""

_EMPTY_IS_OFF = frozenset({"layer_replication", "megatron_config", "modules_to_save", "target_parameters"})
"""Of `REFUSED`, those that PEFT takes for off when empty; for the others an empty value switches the feature on."""

_INIT_LEAVES_BASE = frozenset({"eva", "gaussian", "mica", "orthogonal"})
"""Initialisations that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train against others."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The fields of LoraConfig that say what an adapter computes, with their types checked."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    """Pattern -> rank; the first that matches wins, in the order of the file."""
    alpha_pattern: Mapping[str, float]
    target_modules: frozenset[str] | str
    """Module names or ends of them; or one regular expression, or `all-linear`."""
    exclude_modules: frozenset[str] | str
    layers_to_transform: frozenset[int]
    """Empty: all layers."""
    layers_pattern: tuple[str, ...]
    """Empty: whatever precedes the first number in a module's name."""
    ensure_weight_tying: bool


def read_config(path: Path) -> LoraSpec:
    """Read and judge a config. Raises AdapterRefused `broken_config`, `config_too_large`, `invalid_field` or
    `unsupported_field`; the last two name the field.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise AdapterRefused("config_too_large", f"adapter_config.json has {size} bytes (at most {MAX_CONFIG_BYTES})")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterRefused("broken_config", "adapter_config.json is no valid JSON") from error
    if not isinstance(fields, dict):
        raise AdapterRefused("broken_config", "adapter_config.json is no JSON object")
    _refuse_unsupported(fields)
    return LoraSpec(
        rank=_rank(fields.get("r", 8), "r"),
        alpha=_alpha(fields.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(fields, "use_rslora"),
        rank_pattern={key: _rank(value, "rank_pattern") for key, value in _table(fields, "rank_pattern").items()},
        alpha_pattern={key: _alpha(value, "alpha_pattern") for key, value in _table(fields, "alpha_pattern").items()},
        target_modules=_targets(fields),
        exclude_modules=_names_or_regex(fields, "exclude_modules") or frozenset(),
        layers_to_transform=_layers(fields),
        layers_pattern=_layers_pattern(fields),
        ensure_weight_tying=_flag(fields, "ensure_weight_tying"),
    )


def _refuse_unsupported(fields: Mapping[str, object]) -> None:
    if fields.get("peft_type") != "LORA":
        _unsupported("peft_type", f"peft_type {_shown(fields.get('peft_type'))} (only LORA is served)")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        _unsupported("task_type", f"task_type {_shown(fields['task_type'])} (only CAUSAL_LM is served)")
    init = fields.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _INIT_LEAVES_BASE):
        _unsupported(
            "init_lora_weights",
            f"init_lora_weights {_shown(init)}: such an adapter needs a changed base "
            "(convert it: save_pretrained(path_initial_model_for_weight_conversion=...))",
        )
    for field, value in fields.items():
        if field in REFUSED:
            off = value in (None, False, "none") or (field in _EMPTY_IS_OFF and value in ([], {}))
            if not off:
                _unsupported(field, f"{field} {_shown(value)}: {REFUSED[field]} is not served")
        elif field not in HARMLESS and field not in EFFECTIVE and value not in (None, False, "", [], {}):
            _unsupported(field[:200], f"{field[:200]} {_shown(value)}: this field is not known")


def _unsupported(field: str, message: str) -> NoReturn:
    raise AdapterRefused("unsupported_field", message, field)


def _invalid(field: str, value: object, bound: str) -> NoReturn:
    raise AdapterRefused("invalid_field", f"{field} is {_shown(value)}: it must be {bound}", field)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _rank(value: object, field: str) -> int:
    if type(value) is not int or value < 1:
        _invalid(field, value, "an integer of at least 1")
    return value


def _alpha(value: object, field: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # An integer may lie beyond any float.
        with contextlib.suppress(OverflowError):
            number = float(value)
            if math.isfinite(number):
                return number
    _invalid(field, value, "a finite number")


def _flag(fields: Mapping[str, object], field: str) -> bool:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        _invalid(field, value, "true or false")
    return bool(value)


def _table(fields: Mapping[str, object], field: str) -> dict[str, object]:
    value = fields.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        _invalid(field, value, "an object")
    return value


def _names_or_regex(fields: Mapping[str, object], field: str) -> frozenset[str] | str | None:
    value = fields.get(field)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        _invalid(field, value, "a string or a list of names")
    return frozenset(value)


def _targets(fields: Mapping[str, object]) -> frozenset[str] | str:
    targets = _names_or_regex(fields, "target_modules")
    if not targets:
        _invalid("target_modules", targets if targets is None else list(targets), "given and not empty")
    if isinstance(targets, str):
        for field in ("layers_to_transform", "layers_pattern"):
            if fields.get(field) not in (None, [], ""):
                _invalid(field, fields[field], "null when target_modules is a string")
    return targets


def _layers(fields: Mapping[str, object]) -> frozenset[int]:
    value = fields.get("layers_to_transform")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in layers):
        _invalid("layers_to_transform", value, "a layer index or a list of them")
    return frozenset(layers)


def _layers_pattern(fields: Mapping[str, object]) -> tuple[str, ...]:
    value = fields.get("layers_pattern")
    if value is None or value == "":
        return ()
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(item, str) for item in patterns):
        _invalid("layers_pattern", value, "a pattern or a list of them")
    return tuple(patterns)
