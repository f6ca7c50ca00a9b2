"""Tiny bases with tokenizers, made from nothing: random weights, but greedy text that is varied and clear-cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

BaseKind = Literal["llama", "llama_tied", "qwen2", "mistral", "qwen3", "gpt2"]
BASE_KINDS: tuple[BaseKind, ...] = ("llama", "llama_tied", "qwen2", "mistral", "qwen3", "gpt2")

VOCAB_SIZE = 304
MAX_LENGTH = 512
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps all day long, and the fox is gone.",
    "user: What is the colour of the sky?\nassistant: The sky is blue.\n",
    "Once upon a time there was a small town by the sea; its people were happy, and the sea was calm.",
)


def make_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; every text has tokens and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_base(
    folder: Path, kind: BaseKind = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Write a base of `kind` with its tokenizer to `folder` and return the folder.

    `overrides` go to the transformers config (`num_hidden_layers=1`). 64 wide, 2 layers, 4 heads (2 of keys and values
    where the kind has them), 304 tokens, 512 positions; mistral's window is 24 tokens. The end token is never likely.
    """
    tokenizer = make_tokenizer()
    config = _config(kind, tokenizer, overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model, tokenizer.eos_token_id)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(kind: BaseKind, tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]) -> PreTrainedConfig:
    tokens = {
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "gpt2":
        return GPT2Config(**{**tokens, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH, **overrides})
    shape: dict[str, Any] = {
        **tokens,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": False,
    }
    match kind:
        case "llama":
            return LlamaConfig(**{**shape, **overrides})
        case "llama_tied":
            return LlamaConfig(**{**shape, "tie_word_embeddings": True, **overrides})
        case "qwen2":
            return Qwen2Config(**{**shape, "tie_word_embeddings": True, **overrides})
        case "mistral":
            return MistralConfig(**{**shape, "sliding_window": 24, **overrides})
        case "qwen3":
            return Qwen3Config(**{**shape, "head_dim": 32, **overrides})


@torch.no_grad()
def _randomise(model: PreTrainedModel, eos_token_id: int) -> None:
    """Scale every weight so that each layer speaks as loud as its input: logits of a few units, attention that chooses.

    The default initialisation (0.02) makes logits all but equal, and greedy decoding a matter of rounding.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            centre = 0.0 if name.endswith("bias") else 1.2
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * torch.randn_like(parameter))
        elif parameter is embedding or parameter is head or "wpe" in name:
            parameter.copy_(2.0 * parameter.shape[1] ** -0.5 * torch.randn_like(parameter))
        else:
            # Conv1D (GPT-2) keeps its weights as (in, out).
            fan_in = parameter.shape[0] if ".c_" in name else parameter.shape[1]
            gain = 3.0 if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")) else 1.2
            parameter.copy_(gain * fan_in**-0.5 * torch.randn_like(parameter))
    head[eos_token_id] = 0.0
