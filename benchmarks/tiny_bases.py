"""Tiny bases of every causal model class of the installed transformers: random weights, sizes cut to a few."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 304
NUM_LAYERS = 4
MAX_LENGTH = 128

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_LENGTH,
    "sliding_window": 12,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Mixtures of experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 48,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    # Latent attention.
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "qk_head_dim": 24,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # Recurrent layers.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_expand": 2,
    "state_size": 8,
    "lru_width": 64,
    # Chunks and positions.
    "attention_chunk_size": MAX_LENGTH,
    "local_attention": 12,
    "window_size": 12,
    "rotary_dim": 8,
    "attention_multiplier": 0.25,
    # What older configurations say instead.
    "d_model": 64,
    "n_embd": 64,
    "n_layer": NUM_LAYERS,
    "n_layers": NUM_LAYERS,
    "num_layers": NUM_LAYERS,
    "decoder_layers": NUM_LAYERS,
    "encoder_layers": 1,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "dff": 48,
    "n_positions": MAX_LENGTH,
    "n_ctx": MAX_LENGTH,
    "max_seq_len": MAX_LENGTH,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
}
"""Given to each configuration that has the field."""

SENSES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "embed_dim": 32,
    "out_hidden_size": 64,
    "vision_output_dim": 64,
    "num_global_layers": 1,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "num_blocks": 1,
    "ext_feat_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}
"""The same for towers of images and sound, which nobody calls here."""

_LATENT = {"num_key_value_heads": 4}
_NOT: Any = object()
"""Leaves a field of `SIZES` as the configuration has it."""

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "cpmant": {"dim_head": 16, "dim_ff": 48},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "head_dim": 16},
    "dots1": {"n_shared_experts": 1},
    "falcon": {"head_dim": _NOT, "multi_query": False},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4_unified_text": {"global_head_dim": 32, "num_global_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 32},
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "rel_extent": 32,
        "unpadded_vocab_size": VOCAB_SIZE,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {**_LATENT, "head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "num_hidden_layers": _NOT,
    },
    "prophetnet": {
        "num_hidden_layers": _NOT,
        "num_encoder_layers": 1,
        "num_decoder_layers": NUM_LAYERS,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "num_attention_heads": _NOT,
        "is_decoder": True,
        "add_cross_attention": False,
        "is_encoder_decoder": False,
    },
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen3_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 12},
    "reformer": {
        "is_decoder": True,
        "num_attention_heads": 4,
        "attention_head_size": 16,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 48),
        "feed_forward_size": 48,
        "num_hidden_layers": _NOT,
    },
    "roc_bert": {"pronunciation_embed_dim": 64, "shape_embed_dim": 64, "shape_vocab_size": VOCAB_SIZE},
    "xlnet": {"max_position_embeddings": _NOT, "d_inner": 48},
    "xlstm": {"v_head_dim": _NOT, "qk_head_dim": _NOT, "embedding_dim": _NOT},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What beside `SIZES`, or in its place, a tiny configuration of a kind needs."""

LOUD = 1.5
"""A matrix is drawn so that its outputs are so many times as loud as its inputs."""


LOGITS = 3.0
"""Standard deviation of the logits."""


def kinds() -> dict[str, str]:
    """Class -> its `model_type`, for every class that AutoModelForCausalLM makes."""
    found: dict[str, str] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(name, CONFIG_MAPPING[kind].model_type)
    return found


def tiny_config(kind: str, settings: Mapping[str, Any]) -> PretrainedConfig:
    """The smallest configuration of the kind that still has each of its parts; `settings` replace fields."""
    cls = CONFIG_MAPPING[kind]
    made: PretrainedConfig = cls(**_arguments(cls, SIZES, settings))
    return made


def _arguments(cls: Any, sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    fields = _fields(cls)
    chosen = {name: value for name, value in sizes.items() if name in fields}
    if "kv_lora_rank" in fields:
        chosen |= _LATENT
    for name, part in getattr(cls, "sub_configs", {}).items():
        if name == "text_config":
            part = type(cls().text_config) if part is AutoConfig else part
            chosen[name] = {"model_type": part.model_type, **_arguments(part, sizes, {})}
        else:
            part = type(getattr(cls(), name)) if part is AutoConfig else part
            chosen[name] = {"model_type": part.model_type, **_arguments(part, SENSES, {})}
    chosen |= {**SPECIAL.get(cls.model_type, {}), **settings}
    return {name: value for name, value in chosen.items() if value is not _NOT}


def _fields(cls: Any) -> set[str]:
    return {*getattr(cls, "__dataclass_fields__", ()), *cls.attribute_map}


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights that are loud, lest rounding hides what a wrong one does."""
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if "vision_config" in config.sub_configs else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, LOUD * parameter.shape[-1] ** -0.5)
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    with torch.inference_mode():
        spread = float(model(input_ids=torch.arange(3, 43)[None], use_cache=False).logits.std())
    # Differences are absolute, so the logits of all bases are to be of one size.
    head = model.get_output_embeddings()
    if head is not None:
        head.weight.data.mul_(LOGITS / spread)
    return model


def write_base(folder: Path, model: PreTrainedModel) -> Path:
    """Write the model to `folder`, with a tokenizer of words that are numbers, and return the folder."""
    model.save_pretrained(folder)
    words = models.WordLevel({str(token): token for token in range(VOCAB_SIZE)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    return folder
