"""`adapter_config.json` of PEFT: every field of LoraConfig is served, harmless, or refused by its name.

The fields are those of PEFT 0.21. A field of another version, which is not known here, is ignored as PEFT ignores it,
and a warning says so. It is refused if its name and value say that it changes what LoRA computes.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.tensor_file import refuse_other_content

MAX_CONFIG_BYTES = 4 * 2**20
_MAX_WARNINGS = 32


@dataclass(frozen=True, slots=True)
class FieldRule:
    """The rule for a field of LoraConfig."""

    verdict: Literal["served", "harmless", "refused"]
    note: str
    """What of it is served; why it changes nothing; or why it is refused."""
    off: tuple[object, ...] = (None, False)
    """Of a refused field, the values that ask for nothing."""


_OWN_INIT = "read with its own `init_lora_weights` only"
_EMPTY_IS_OFF: tuple[object, ...] = (None, False, [], {})
"""For other refused fields an empty value switches the feature on."""

FIELDS: Mapping[str, FieldRule] = {
    "alora_invocation_tokens": FieldRule(
        "served",
        "tokens before their last occurrence in a prompt are the base's and share its cached prefixes; without one the "
        "base answers; linear modules only, and not together with `use_dora`, trained biases, added tokens, "
        "`modules_to_save` or `trainable_token_indices`",
    ),
    "alpha_pattern": FieldRule("served", "the first pattern that matches the end of a module's name"),
    "arrow_config": FieldRule("refused", "Arrow routes every token over several adapters"),
    "auto_mapping": FieldRule("harmless", "names the base's class"),
    "base_model_name_or_path": FieldRule("harmless", "a name; what counts is that every shape is the base's"),
    "bias": FieldRule("served", "`none`, `lora_only`, `all`: a trained bias is added less the base's own"),
    "corda_config": FieldRule("harmless", _OWN_INIT),
    "ensure_weight_tying": FieldRule("served", "where the base ties its output to the embedding, both must agree"),
    "eva_config": FieldRule("harmless", _OWN_INIT),
    "exclude_modules": FieldRule("served", "a list or a regular expression"),
    "fan_in_fan_out": FieldRule("served", "either way: LoRA's delta is the same however the base stores its weight"),
    "inference_mode": FieldRule("harmless", "training only"),
    "init_lora_weights": FieldRule(
        "served",
        "`true`, `false`, `gaussian`, `orthogonal`, `eva`, `mica`, which leave the base alone; `pissa`, `olora`, "
        "`corda`, `loftq`, `lora_ga` are refused unless PEFT has converted the adapter, which makes it `true`",
    ),
    "kasa_config": FieldRule("refused", "KaSA cuts singular values off the base's weights"),
    "layer_replication": FieldRule("refused", "it repeats layers of the base", _EMPTY_IS_OFF),
    "layers_pattern": FieldRule("served", "one or a list; without it a module's layer is the first number in its name"),
    "layers_to_transform": FieldRule("served", "one or a list"),
    "loftq_config": FieldRule("harmless", _OWN_INIT),
    "lora_alpha": FieldRule("served", "any finite number"),
    "lora_bias": FieldRule("served", "the bias on B is added, scaled as B is; PEFT has none for embeddings"),
    "lora_dropout": FieldRule("harmless", "training only"),
    "lora_ga_config": FieldRule("harmless", _OWN_INIT),
    "megatron_config": FieldRule("refused", "it is for Megatron's layers, which no base here has", _EMPTY_IS_OFF),
    "megatron_core": FieldRule("harmless", "read with `megatron_config` only"),
    "modules_to_save": FieldRule(
        "served",
        "the embedding, the output (`lm_head`) and norms, by the end of their names; refused where it names other "
        "modules; names that the base lacks with a warning",
    ),
    "monteclora_config": FieldRule("harmless", "MonteCLoRA perturbs A in training only"),
    "peft_type": FieldRule("served", "`LORA`"),
    "peft_version": FieldRule("harmless", "a file means what PEFT 0.21 makes of it"),
    "qalora_group_size": FieldRule("harmless", "read with `use_qalora` only"),
    "r": FieldRule("served", "up to `adapters.max_rank`"),
    "rank_pattern": FieldRule("served", "the first pattern that matches the end of a module's name"),
    "revision": FieldRule("harmless", "the base's, see `base_model_name_or_path`"),
    "runtime_config": FieldRule("harmless", "where PEFT is to put things; never saved"),
    "target_modules": FieldRule(
        "served",
        "a list, a regular expression, `all-linear`; any linear module, embedding, output; names that the base lacks "
        "with a warning, as long as another one matches",
    ),
    "target_parameters": FieldRule(
        "served",
        "the tensors of a mixture's experts, its routers' weights, and weights of linear modules; not together with "
        "`use_dora` or `lora_bias`",
    ),
    "task_type": FieldRule(
        "served", "`CAUSAL_LM` or none; another of PEFT's tasks with a warning, as long as no head of its own is saved"
    ),
    "trainable_token_indices": FieldRule(
        "served",
        "a list or an object, on the embedding and the output, as a rank for each token; PEFT has them not together "
        "with LoRA or `modules_to_save` on the same module",
    ),
    "use_bdlora": FieldRule("refused", "BD-LoRA stores its factors as blocks"),
    "use_dora": FieldRule(
        "served",
        "its magnitudes are divided by the norms of the base's weights with LoRA's added, at loading; not "
        "together with `lora_bias`, nor with `trainable_token_indices` or `ensure_weight_tying` on the same module",
    ),
    "use_qalora": FieldRule("refused", "QALoRA pools the inputs of quantised layers"),
    "use_rslora": FieldRule("served", "scaling by the root of the rank"),
    "velora_config": FieldRule("harmless", "VeLoRA changes the backward pass only"),
}
"""Every field of LoraConfig. The reference prints this table."""

INPUT_EMBEDDING = ""
"""In place of a name: whatever module the base takes its tokens in with."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_MAX_NAMES = 1024

_TASKS = frozenset({"SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})
"""PEFT's; for each it computes the same LoRA, and its head is a module beside it."""

_OFF: tuple[object, ...] = (None, False, "", [], {})
"""How PEFT spells that a field asks for nothing."""

_NOTES = re.compile(
    r"((pre)?train(ed|er|ing)?|data(set)?|eval|model|base_model|num|max|quant(ization)?|bnb|optim(izer)?|lr|scheduler"
    r"|deepspeed|fsdp|tokenizer|generation|wandb|sft|dpo|grpo|run)_.*|(lora_?plus|lora)?_?.*_(lr|lr_ratio|seed)"
    r"|lora_dropout_.*|(use|enable)_(.*_)?"
    r"(flash_attention|flash_attn|gradient_checkpointing|cache|unsloth|liger|sdpa|bf16|fp16|tf32|8bit|4bit)(_.*)?"
)
"""Names of unknown fields that trainers write down for themselves."""

_TWINS: Mapping[str, str] = {
    "alpha": "lora_alpha",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target_modules": "target_modules",
    "rank": "r",
}
"""Other names of fields: where both say the same, one of them is a note."""

_COMPUTES = re.compile(
    r"(use|enable|target|init|invocation|fan|dora|lora|alora)_.*|.*_(config|lora|dora|pattern|parameters)"
    r"|(.*_)?(alpha|bias|layers?|modules?|pattern|r|rank|scale|scaling)(_.*)?"
)
"""Names of unknown fields that speak of what LoRA computes and not of how it was trained."""

_INIT_LEAVES_BASE = frozenset({"eva", "gaussian", "mica", "orthogonal"})


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
    target_parameters: frozenset[str]
    """Parameters' names or ends of them."""
    exclude_modules: frozenset[str] | str
    layers_to_transform: frozenset[int]
    """Empty: all layers."""
    layers_pattern: tuple[str, ...]
    """Empty: whatever precedes the first number in a module's name."""
    ensure_weight_tying: bool
    bias: Literal["none", "lora_only", "all"]
    """Whose biases were trained: nobody's, those of the targeted modules, or all of the base."""
    lora_bias: bool
    use_dora: bool
    modules_to_save: frozenset[str]
    """Ends of the names of modules that were trained as a whole."""
    invocation: tuple[int, ...]
    """Tokens with which the adapter begins in a prompt; empty: it always computes."""
    token_indices: Mapping[str, tuple[int, ...]]
    """End of a module's name -> tokens whose rows were trained; `INPUT_EMBEDDING` stands for the base's embedding."""
    warnings: tuple[str, ...] = ()
    """What the config says and PEFT ignores."""


def read_config(path: Path, *, strict: bool = False) -> LoraSpec:
    """Read and judge a config; `strict` refuses what would be a warning.

    Raises AdapterRefused `broken_config`, `config_too_large`, `invalid_field` or `unsupported_field`; the last two name
    the field.
    """
    refuse_other_content(path, "broken_config")
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise AdapterRefused(
            "config_too_large", f"adapter_config.json has {size} bytes (at most {MAX_CONFIG_BYTES})", path.name
        )
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterRefused("broken_config", "adapter_config.json is not valid JSON", path.name) from error
    if not isinstance(fields, dict):
        raise AdapterRefused("broken_config", "adapter_config.json is not a JSON object", path.name)
    if not is_unicode(fields):
        raise AdapterRefused("broken_config", "adapter_config.json has half of a surrogate pair", path.name)
    _refuse_unsupported(fields)
    ignored = dict(_ignored(fields))
    for field, warning in ignored.items():
        if strict:
            _unsupported(field[:200], f"{warning} (the source is strict)")
    return LoraSpec(
        rank=_rank(fields.get("r", 8), "r"),
        alpha=_alpha(fields.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(fields, "use_rslora"),
        rank_pattern={k: _rank(value, "rank_pattern", k) for k, value in _table(fields, "rank_pattern").items()},
        alpha_pattern={k: _alpha(value, "alpha_pattern", k) for k, value in _table(fields, "alpha_pattern").items()},
        target_modules=_targets(fields),
        target_parameters=_parameters(fields),
        exclude_modules=_names_or_regex(fields, "exclude_modules") or frozenset(),
        layers_to_transform=_layers(fields),
        layers_pattern=_layers_pattern(fields),
        ensure_weight_tying=_flag(fields, "ensure_weight_tying"),
        bias=_bias(fields),
        lora_bias=_flag(fields, "lora_bias"),
        use_dora=_flag(fields, "use_dora"),
        modules_to_save=_modules_to_save(fields),
        invocation=_invocation(fields),
        token_indices=_token_indices(fields),
        warnings=tuple(ignored.values())[:_MAX_WARNINGS],
    )


def is_unicode(content: object) -> bool:
    """Return True if all texts of a JSON value can be written; `"\\ud800"` is valid JSON, and cannot."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_unsupported(fields: Mapping[str, object]) -> None:
    if "peft_type" not in fields:
        _unsupported(
            "peft_type", f"peft_type is missing: this is no config of PEFT (it has {_shown(list(fields)[:4])})"
        )
    if fields.get("peft_type") != "LORA":
        _unsupported("peft_type", f"peft_type {_shown(fields.get('peft_type'))} (only LORA is served)")
    task = fields.get("task_type")
    if task is not None and not (isinstance(task, str) and task in _TASKS):
        _unsupported("task_type", f"task_type is {_shown(task)}; it must be one of {', '.join(sorted(_TASKS))}")
    init = fields.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init in _INIT_LEAVES_BASE)):
        _unsupported(
            "init_lora_weights",
            f"init_lora_weights {_shown(init)}: such an adapter needs a changed base "
            "(convert it: save_pretrained(path_initial_model_for_weight_conversion=...))",
        )
    if fields.get("use_dora") and fields.get("lora_bias"):
        _unsupported("use_dora", "use_dora and lora_bias are both true, which PEFT refuses")
    for name, value in fields.items():
        rule = FIELDS.get(name)
        if rule is None and value not in _OFF and _may_compute(name, value, fields):
            _unsupported(name[:200], f"{name[:200]} {_shown(value)}: this field is not known")
        if rule is not None and rule.verdict == "refused" and value not in rule.off:
            _unsupported(name, f"{name} {_shown(value)} is not served: {rule.note}")


def _may_compute(name: str, value: object, fields: Mapping[str, object]) -> bool:
    """Return True for an unknown field that may change what LoRA computes."""
    if name in _TWINS and fields.get(_TWINS[name]) == value:
        return False
    return _COMPUTES.fullmatch(name) is not None and _NOTES.fullmatch(name) is None


def _ignored(fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Fields that PEFT ignores, each with its warning."""
    task = fields.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        yield "task_type", f"task_type is {task}: the adapter is served for CAUSAL_LM, without a head of that task"
    for name, value in fields.items():
        if name not in FIELDS and value not in _OFF:
            yield name, f"{name[:200]} {_shown(value)}: this field is not known, and ignored"


def _unsupported(field: str, message: str) -> NoReturn:
    raise AdapterRefused("unsupported_field", message, field)


def _invalid(field: str, value: object, bound: str, pattern: str | None = None) -> NoReturn:
    where = field if pattern is None else f"{field}[{_shown(pattern)}]"
    raise AdapterRefused("invalid_field", f"{where} is {_shown(value)}: it must be {bound}", field)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _rank(value: object, field: str, pattern: str | None = None) -> int:
    if type(value) is not int or value < 1:
        _invalid(field, value, "an integer of at least 1", pattern)
    return value


def _alpha(value: object, field: str, pattern: str | None = None) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # An integer may lie beyond any float.
        with contextlib.suppress(OverflowError):
            number = float(value)
            if math.isfinite(number):
                return number
    _invalid(field, value, "a finite number", pattern)


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
    targets = _names_or_regex(fields, "target_modules") or frozenset()
    if not targets and not fields.get("target_parameters"):
        _invalid("target_modules", fields.get("target_modules"), "given and not empty")
    if isinstance(targets, str):
        for field in ("layers_to_transform", "layers_pattern"):
            if fields.get(field) not in (None, [], ""):
                _invalid(field, fields[field], "null when target_modules is a string")
    return targets


def _parameters(fields: Mapping[str, object]) -> frozenset[str]:
    name = "target_parameters"
    value = fields.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        _invalid(name, value, "a list of parameter names")
    if len(value) > _MAX_NAMES:
        _invalid(name, value, f"of {_MAX_NAMES} names at most")
    for other in ("use_dora", "lora_bias", "alora_invocation_tokens"):
        if value and fields.get(other) not in _OFF:
            _unsupported(name, f"{name} and {other} are both set, which PEFT has not for parameters")
    return frozenset(value)


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


def _bias(fields: Mapping[str, object]) -> Literal["none", "lora_only", "all"]:
    value = fields.get("bias") or "none"
    if value not in ("none", "lora_only", "all"):
        _invalid("bias", value, "none, lora_only or all")
    return value


def _modules_to_save(fields: Mapping[str, object]) -> frozenset[str]:
    value = fields.get("modules_to_save") or []
    # PEFT takes them for names and for regular expressions at once; only what means the same as both is taken here.
    if not isinstance(value, list) or not all(isinstance(item, str) and _NAME.fullmatch(item) for item in value):
        _invalid("modules_to_save", value, "a list of module names")
    if len(value) > _MAX_NAMES:
        _invalid("modules_to_save", value, f"of {_MAX_NAMES} names at most")
    return frozenset(value)


_BEFORE = "PEFT changes tokens before the invocation too then, where the base alone computes here"


def refuse_before(what: str) -> NoReturn:
    """Refuse an adapter with an invocation for what it changes of tokens before that."""
    name = "alora_invocation_tokens"
    _unsupported(name, f"{name} is set, and {what}: {_BEFORE}")


def _invocation(fields: Mapping[str, object]) -> tuple[int, ...]:
    name = "alora_invocation_tokens"
    value = fields.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        _invalid(name, value, "a list of tokens")
    if not 0 < len(value) <= _MAX_NAMES:
        _invalid(name, value, f"of 1 to {_MAX_NAMES} tokens")
    if fields.get("use_dora") not in _OFF:
        _unsupported(name, f"{name} and use_dora are both set, which PEFT does not combine")
    for other in ("modules_to_save", "trainable_token_indices"):
        if fields.get(other) not in _OFF:
            _unsupported(name, f"{name} and {other} are both set: {_BEFORE}")
    return tuple(value)


def _token_indices(fields: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    value = fields.get(name)
    if value is None:
        return {}
    table: dict[str, Any] = value if isinstance(value, dict) else {INPUT_EMBEDDING: value}
    if len(table) > _MAX_NAMES:
        _invalid(name, value, f"for {_MAX_NAMES} names at most")
    for module, indices in table.items():
        if isinstance(value, dict) and not _NAME.fullmatch(module):
            _invalid(name, value, "a list of tokens, or an object of such lists by module name")
        if not isinstance(indices, list) or not all(type(item) is int and 0 <= item < 2**31 for item in indices):
            _invalid(name, value, "a list of tokens, or an object of such lists by module name")
        if not indices or len(set(indices)) != len(indices):
            _invalid(name, value, "a token at least, and none twice")
    return {module: tuple(indices) for module, indices in table.items()}
