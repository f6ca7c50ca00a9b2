"""Adapters for every field of LoraConfig, made by PEFT: those that are served, and those that must be refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.adapters import ALL_SEVEN, make_adapter, randomise_adapter
from tests.support.bases import BaseKind

TOKENS = (3, 7, 250)


@dataclass(frozen=True)
class FieldCase:
    """What one adapter asks for."""

    fields: tuple[str, ...]
    """The fields of LoraConfig that it is made for; for a refused one, the field that the refusal names."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of LoraConfig beside those of `kind`."""
    base: BaseKind = "llama"
    kind: str = "rank4_qv"
    """A recipe of `tests/support/adapters.py`."""
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are written into the saved config afterwards: what PEFT itself cannot make here."""
    code: str = "unsupported_field"
    """Of the refusal."""

    def make(self, folder: Path, base: Path) -> Path:
        """Let PEFT write the adapter for the base of kind `self.base`."""
        make_adapter(folder, base, self.kind, **self.options)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **self.edit}))
        return folder


def _gpt2(*fields: str, **options: Any) -> FieldCase:
    return FieldCase(fields, options, "gpt2", "rank4")


SERVED: dict[str, FieldCase] = {
    "rank1": FieldCase(("r", "lora_alpha", "peft_type", "target_modules", "task_type"), kind="rank1"),
    "no-task": FieldCase(("task_type",), edit={"task_type": None}),
    "other-task": FieldCase(("task_type",), edit={"task_type": "FEATURE_EXTRACTION"}),
    "unmatched-targets": FieldCase(
        ("target_modules",), {"target_modules": ("q_proj", "c_attn", "query_key_value"), "modules_to_save": ("score",)}
    ),
    "unmatched-save": FieldCase(("modules_to_save",), {"modules_to_save": ("classifier", "norm")}),
    "parameters": FieldCase(
        ("target_parameters",),
        {"target_parameters": ["o_proj.weight", "mlp.down_proj.weight"], "rank_pattern": {r"o_proj\.weight": 6}},
    ),
    "patterns": FieldCase(("rank_pattern", "alpha_pattern"), kind="rank_pattern"),
    "rslora": FieldCase(("use_rslora",), base="qwen2", kind="rslora"),
    "all-linear": FieldCase(("target_modules",), kind="all_linear"),
    "all-linear-tied": FieldCase(("target_modules",), base="llama_tied", kind="all_linear"),
    "regex": FieldCase(("target_modules",), {"target_modules": r".*\.1\.(self_attn\.[kv]|mlp\.up)_proj|lm_head"}),
    "embeddings": FieldCase(("target_modules",), kind="embeddings_all"),
    "embeddings-tied": FieldCase(("target_modules",), base="llama_tied", kind="embeddings_all"),
    "exclude-list": FieldCase(("exclude_modules",), {"exclude_modules": ["0.self_attn.q_proj"]}),
    "exclude-regex": FieldCase(("exclude_modules",), {"exclude_modules": r"model\.layers\.0\..*"}),
    "one-layer": FieldCase(("layers_to_transform",), {"layers_to_transform": 1}),
    "layers": FieldCase(
        ("layers_to_transform", "layers_pattern"), {"layers_to_transform": [0], "layers_pattern": "layers"}
    ),
    "velora": FieldCase(("velora_config",), {"velora_config": {}}),
    "monteclora": FieldCase(("monteclora_config",), {"monteclora_config": {}}),
    "conv1d": _gpt2("fan_in_fan_out"),
    "conv1d-all": FieldCase(("fan_in_fan_out",), base="gpt2", kind="rank16"),
    "gaussian": FieldCase(("init_lora_weights",), {"init_lora_weights": "gaussian"}),
    "orthogonal": FieldCase(("init_lora_weights",), {"init_lora_weights": "orthogonal"}),
    "mica": FieldCase(("init_lora_weights",), {"init_lora_weights": "mica"}),
    "eva": FieldCase(("init_lora_weights",), {"init_lora_weights": "eva"}),
    "random": FieldCase(("init_lora_weights",), {"init_lora_weights": False}),
    "bias-lora": FieldCase(("bias",), {"bias": "lora_only"}, "qwen2"),
    "bias-lora-conv1d": _gpt2("bias", bias="lora_only"),
    "bias-lora-embeddings": FieldCase(("bias",), {"bias": "lora_only"}, "qwen2", "embeddings_all"),
    "bias-all": FieldCase(("bias",), {"bias": "all"}, "qwen2"),
    "bias-all-norms": _gpt2("bias", bias="all"),
    "bias-all-saved-norm": _gpt2("bias", "modules_to_save", bias="all", modules_to_save=("ln_f",)),
    "lora-bias": FieldCase(("lora_bias",), {"lora_bias": True}),
    "lora-bias-and-bias": FieldCase(
        ("lora_bias", "bias"), {"lora_bias": True, "bias": "all", "use_rslora": True}, "qwen2"
    ),
    "lora-bias-head": FieldCase(("lora_bias",), {"lora_bias": True, "target_modules": ("q_proj", "lm_head")}),
    "lora-bias-conv1d": _gpt2("lora_bias", lora_bias=True),
    "save-embedding": FieldCase(("modules_to_save",), {"modules_to_save": ("embed_tokens",)}),
    "save-head": FieldCase(("modules_to_save",), {"modules_to_save": ("lm_head",)}),
    "save-both": FieldCase(("modules_to_save",), {"modules_to_save": ("embed_tokens", "lm_head")}),
    "save-norms": FieldCase(("modules_to_save",), {"modules_to_save": ("norm",)}, "qwen3"),
    "save-norms-with-bias": _gpt2("modules_to_save", modules_to_save=("ln_1", "transformer.ln_f")),
    "save-one-norm": FieldCase(("modules_to_save",), {"modules_to_save": ("model.norm",)}, "qwen2", "rank16"),
    "save-all-linear": FieldCase(
        ("modules_to_save",), {"modules_to_save": ("lm_head", "input_layernorm")}, kind="all_linear"
    ),
    "save-head-targeted": FieldCase(
        ("modules_to_save",), {"modules_to_save": ("lm_head",), "target_modules": ("lm_head", "embed_tokens")}
    ),
    "save-embedding-tied": FieldCase(("modules_to_save",), {"modules_to_save": ("embed_tokens",)}, "llama_tied"),
    "save-head-tied": FieldCase(("modules_to_save",), {"modules_to_save": ("lm_head",)}, "llama_tied"),
    "save-both-tied": FieldCase(("modules_to_save",), {"modules_to_save": ("embed_tokens", "lm_head")}, "qwen2"),
    "save-wte-tied": _gpt2("modules_to_save", modules_to_save=("wte",)),
    "save-embedding-lora-head": FieldCase(
        ("modules_to_save",),
        {"modules_to_save": ("embed_tokens",), "target_modules": ("lm_head", "q_proj")},
        "llama_tied",
    ),
    "save-head-lora-embedding": FieldCase(
        ("modules_to_save",),
        {"modules_to_save": ("lm_head",), "target_modules": ("embed_tokens", "q_proj")},
        "llama_tied",
    ),
    "tie-lora": FieldCase(("ensure_weight_tying",), {"ensure_weight_tying": True}, "llama_tied", "embeddings"),
    "tie-lora-untied": FieldCase(("ensure_weight_tying",), {"ensure_weight_tying": True}, "llama", "embeddings"),
    "tie-saved": FieldCase(
        ("ensure_weight_tying", "modules_to_save"),
        {"ensure_weight_tying": True, "modules_to_save": ("lm_head",)},
        "llama_tied",
    ),
    "tie-saved-untied": FieldCase(
        ("ensure_weight_tying", "modules_to_save"),
        {"ensure_weight_tying": True, "modules_to_save": ("embed_tokens", "lm_head")},
    ),
    "tie-saved-wte": _gpt2("ensure_weight_tying", ensure_weight_tying=True, modules_to_save=("wte",)),
    "tie-tokens": FieldCase(
        ("ensure_weight_tying", "trainable_token_indices"),
        {
            "ensure_weight_tying": True,
            "trainable_token_indices": {"embed_tokens": list(TOKENS), "lm_head": list(TOKENS)},
        },
        "llama_tied",
    ),
    "tokens": FieldCase(("trainable_token_indices",), {"trainable_token_indices": list(TOKENS)}),
    "tokens-tied": FieldCase(("trainable_token_indices",), {"trainable_token_indices": list(TOKENS)}, "llama_tied"),
    "tokens-wte": _gpt2("trainable_token_indices", trainable_token_indices=list(TOKENS)),
    "tokens-of-head": FieldCase(("trainable_token_indices",), {"trainable_token_indices": {"lm_head": list(TOKENS)}}),
    "tokens-of-tied-head": FieldCase(
        ("trainable_token_indices",), {"trainable_token_indices": {"lm_head": list(TOKENS)}}, "llama_tied"
    ),
    "tokens-of-both": FieldCase(
        ("trainable_token_indices",), {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}}
    ),
    "tokens-of-both-tied": FieldCase(
        ("trainable_token_indices",),
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
        "llama_tied",
    ),
    "tokens-that-differ-tied": FieldCase(
        ("trainable_token_indices",),
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [9, 7, 1]}},
        "llama_tied",
    ),
    "tokens-lora-head-tied": FieldCase(
        ("trainable_token_indices",),
        {"trainable_token_indices": list(TOKENS), "target_modules": ("lm_head", "q_proj"), "lora_alpha": 3},
        "llama_tied",
    ),
    "tokens-saved-head": FieldCase(
        ("trainable_token_indices",), {"trainable_token_indices": list(TOKENS), "modules_to_save": ("lm_head",)}
    ),
    "dora": FieldCase(("use_dora",), {"use_dora": True, "target_modules": ALL_SEVEN}, "qwen2"),
    "dora-one-of-a-group": FieldCase(("use_dora",), {"use_dora": True}),
    "dora-rslora": FieldCase(("use_dora", "use_rslora"), {"use_dora": True}, kind="rslora"),
    "dora-patterns": FieldCase(("use_dora", "rank_pattern", "alpha_pattern"), {"use_dora": True}, kind="rank_pattern"),
    "dora-embeddings": FieldCase(("use_dora",), {"use_dora": True}, kind="embeddings_all"),
    "dora-embeddings-tied": FieldCase(("use_dora",), {"use_dora": True}, "llama_tied", "embeddings_all"),
    "dora-conv1d": _gpt2("use_dora", use_dora=True),
    "dora-bias": FieldCase(
        ("use_dora", "bias", "modules_to_save"),
        {"use_dora": True, "bias": "all", "modules_to_save": ("norm", "embed_tokens")},
        "qwen2",
    ),
    "dora-tokens": FieldCase(
        ("use_dora", "trainable_token_indices"), {"use_dora": True, "trainable_token_indices": list(TOKENS)}
    ),
    "everything": FieldCase(
        ("bias", "modules_to_save", "trainable_token_indices"),
        {
            "target_modules": (*ALL_SEVEN, "lm_head"),
            "bias": "all",
            "lora_bias": True,
            "modules_to_save": ("norm",),
            "trainable_token_indices": list(TOKENS),
        },
        "qwen2",
    ),
}
"""Ids -> adapters that must do what PEFT does with them."""

ACTIVATED: dict[str, FieldCase] = {
    "alora": FieldCase(
        ("alora_invocation_tokens",), {"alora_invocation_tokens": list(TOKENS), "target_modules": ALL_SEVEN}
    ),
    "alora-head": FieldCase(
        ("alora_invocation_tokens", "use_rslora"),
        {"alora_invocation_tokens": list(TOKENS[1:]), "use_rslora": True, "target_modules": ("v_proj", "lm_head")},
    ),
    "alora-bias": FieldCase(
        ("alora_invocation_tokens", "lora_bias"), {"alora_invocation_tokens": list(TOKENS[-1:]), "lora_bias": True}
    ),
    "alora-never": FieldCase(("alora_invocation_tokens",), {"alora_invocation_tokens": [250, 7, 3]}),
    "alora-conv1d": _gpt2("alora_invocation_tokens", alora_invocation_tokens=list(TOKENS)),
}
"""The same for adapters that begin in the midst of a text, with `TOKENS` or a part of them."""

REFUSED: dict[str, FieldCase] = {
    "alora-empty": FieldCase(("alora_invocation_tokens",), edit={"alora_invocation_tokens": []}, code="invalid_field"),
    "alora-text": FieldCase(
        ("alora_invocation_tokens",), edit={"alora_invocation_tokens": "check"}, code="invalid_field"
    ),
    "alora-embedding": FieldCase(
        ("alora_invocation_tokens",), kind="embed_tokens", edit={"alora_invocation_tokens": [1, 2]}
    ),
    "alora-dora": FieldCase(("alora_invocation_tokens",), {"use_dora": True}, edit={"alora_invocation_tokens": [1]}),
    "alora-saved": FieldCase(
        ("alora_invocation_tokens",), {"modules_to_save": ("norm",)}, edit={"alora_invocation_tokens": [1]}
    ),
    "alora-biases": FieldCase(
        ("alora_invocation_tokens",), {"bias": "all"}, "qwen2", edit={"alora_invocation_tokens": [1]}
    ),
    "arrow": FieldCase(("arrow_config",), edit={"arrow_config": {"top_k": 2}}),
    "bdlora": FieldCase(("use_bdlora",), {"use_bdlora": {"target_modules_bd_a": ["q_proj", "v_proj"], "nblocks": 2}}),
    "dora-lora-bias": FieldCase(("use_dora",), {"lora_bias": True}, edit={"use_dora": True}),
    "dora-tokens-of-head": FieldCase(
        ("use_dora",),
        {"use_dora": True, "target_modules": ("lm_head",)},
        "llama_tied",
        edit={"trainable_token_indices": [3]},
    ),
    "kasa": FieldCase(("kasa_config",), {"kasa_config": {}}),
    "layer-replication": FieldCase(("layer_replication",), {"layer_replication": [[0, 2], [1, 2]]}),
    "megatron": FieldCase(("megatron_config",), edit={"megatron_config": {"tensor_model_parallel_size": 1}}),
    "qalora": FieldCase(("use_qalora",), edit={"use_qalora": True}),
    "parameters-dora": FieldCase(
        ("target_parameters",), {"target_parameters": ["o_proj.weight"]}, edit={"use_dora": True}
    ),
    "pissa": FieldCase(("init_lora_weights",), {"init_lora_weights": "pissa"}),
    "pissa-fast": FieldCase(("init_lora_weights",), {"init_lora_weights": "pissa_niter_4"}),
    "olora": FieldCase(("init_lora_weights",), {"init_lora_weights": "olora"}),
    "corda": FieldCase(("init_lora_weights",), edit={"init_lora_weights": "corda"}),
    "loftq": FieldCase(("init_lora_weights",), edit={"init_lora_weights": "loftq"}),
    "lora-ga": FieldCase(("init_lora_weights",), edit={"init_lora_weights": "lora_ga"}),
    "other-method": FieldCase(("peft_type",), edit={"peft_type": "LOHA"}),
    "other-task": FieldCase(("task_type",), edit={"task_type": "SEQ_WARP"}),
    "other-bias": FieldCase(("bias",), edit={"bias": "some"}, code="invalid_field"),
    "lora-bias-embedding": FieldCase(("lora_bias",), kind="embed_tokens", edit={"lora_bias": True}),
    "save-linear": FieldCase(("modules_to_save",), {"modules_to_save": ("o_proj",)}),
    "save-block": FieldCase(("modules_to_save",), {"modules_to_save": ("mlp",)}),
    "save-layer": FieldCase(
        ("modules_to_save",), {"modules_to_save": ("layers.0",), "target_modules": ("1.self_attn.q_proj",)}
    ),
    "save-all-norms-and-linear": FieldCase(("modules_to_save",), {"modules_to_save": ("norm", "up_proj")}),
    "save-positions": FieldCase(("modules_to_save",), {"modules_to_save": ("wpe",)}, "gpt2", "rank4"),
    "save-pattern": FieldCase(("modules_to_save",), edit={"modules_to_save": ["lm_(head)?"]}, code="invalid_field"),
    "save-too-many": FieldCase(
        ("modules_to_save",), edit={"modules_to_save": ["lm_head"] * 1025}, code="invalid_field"
    ),
    "save-text": FieldCase(("modules_to_save",), edit={"modules_to_save": "lm_head"}, code="invalid_field"),
    "save-and-lora": FieldCase(("modules_to_save",), kind="embeddings", edit={"modules_to_save": ["head"]}),
    "tie-other-saved": FieldCase(
        ("ensure_weight_tying",),
        {"modules_to_save": ("embed_tokens", "lm_head")},
        "llama_tied",
        edit={"ensure_weight_tying": True},
    ),
    "tie-other-lora": FieldCase(
        ("ensure_weight_tying",), base="llama_tied", kind="embeddings", edit={"ensure_weight_tying": True}
    ),
    "tie-other-tokens": FieldCase(
        ("trainable_token_indices",),
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [9, 7, 1]}},
        "llama_tied",
        edit={"ensure_weight_tying": True},
    ),
    "tokens-of-linear": FieldCase(("trainable_token_indices",), {"trainable_token_indices": {"o_proj": [3]}}),
    "tokens-of-unknown": FieldCase(("trainable_token_indices",), edit={"trainable_token_indices": {"wte": [3]}}),
    "tokens-and-lora": FieldCase(
        ("trainable_token_indices",), kind="embed_tokens", edit={"trainable_token_indices": [3]}
    ),
    "tokens-and-saved": FieldCase(
        ("trainable_token_indices",),
        {"modules_to_save": ("embed_tokens",)},
        edit={"trainable_token_indices": {"model.embed_tokens": [3]}},
    ),
    "tokens-and-saved-tied-head": FieldCase(
        ("trainable_token_indices",),
        {"modules_to_save": ("lm_head",)},
        "llama_tied",
        edit={"trainable_token_indices": [3]},
    ),
    "tokens-none": FieldCase(("trainable_token_indices",), {"trainable_token_indices": []}, code="invalid_field"),
    "tokens-below": FieldCase(
        ("trainable_token_indices",), edit={"trainable_token_indices": [-1]}, code="invalid_field"
    ),
    "tokens-beyond-integers": FieldCase(
        ("trainable_token_indices",), edit={"trainable_token_indices": [2**31]}, code="invalid_field"
    ),
    "tokens-too-many-names": FieldCase(
        ("trainable_token_indices",),
        edit={"trainable_token_indices": {f"n{number}": [3] for number in range(1025)}},
        code="invalid_field",
    ),
    "tokens-text": FieldCase(("trainable_token_indices",), edit={"trainable_token_indices": "3"}, code="invalid_field"),
    "tokens-no-names": FieldCase(
        ("trainable_token_indices",), edit={"trainable_token_indices": {"": [3]}}, code="invalid_field"
    ),
    "tokens-twice": FieldCase(("trainable_token_indices",), {"trainable_token_indices": [3, 3]}, code="invalid_field"),
    "tokens-too-many": FieldCase(
        ("trainable_token_indices",), {"trainable_token_indices": list(range(65))}, code="rank_too_large"
    ),
    "tokens-beside-ranks": FieldCase(
        ("trainable_token_indices",),
        {"trainable_token_indices": [3, 7, 9], "target_modules": ("lm_head",), "r": 62},
        "llama_tied",
        code="rank_too_large",
    ),
    "tokens-added": FieldCase(
        ("trainable_token_indices",),
        {"trainable_token_indices": [3, 7]},
        edit={"trainable_token_indices": [3, 304]},
        code="vocabulary_resized",
    ),
}
"""Ids -> adapters that must be refused by the name of their field."""


def make_converted(folder: Path, base: Path, init: str) -> Path:
    """An adapter of an initialisation that changes the base, converted by PEFT so that it needs the unchanged one."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init
    )
    initial, trained = folder / "initial", folder / "trained"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        peft_model.peft_config["default"].init_lora_weights = True
        peft_model.save_pretrained(initial)
        peft_model.peft_config["default"].init_lora_weights = init
        randomise_adapter(peft_model, 0.5)
        peft_model.save_pretrained(trained, path_initial_model_for_weight_conversion=str(initial))
    return trained


def make_resized(folder: Path, base: Path, num_tokens: int, **options: Any) -> Path:
    """An adapter of the base with `num_tokens` tokens added, or taken away where it is negative."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **options})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + num_tokens, mean_resizing=False)
        peft_model = get_peft_model(model, config)
        randomise_adapter(peft_model, 0.5)
        peft_model.save_pretrained(folder)
    return folder
