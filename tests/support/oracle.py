"""PEFT and transformers, one request at a time in fp32, greedily: what every engine of ours must equal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Generation:
    """What the oracle said."""

    tokens: tuple[int, ...]
    """The new tokens, the end token included if it came and was to stop."""
    logprobs: Tensor
    """(len(tokens), vocab) float32: the whole distribution that each token was taken from."""

    @property
    def chosen_logprobs(self) -> Tensor:
        """(len(tokens),) float32: logprob of each token."""
        return self.logprobs.gather(1, torch.tensor(self.tokens).unsqueeze(1)).squeeze(1)

    @property
    def smallest_gap(self) -> float:
        """Least distance between the best and the second best logprob: how near greedy decoding came to a tie."""
        best = self.logprobs.topk(2, dim=1).values
        return float((best[:, 0] - best[:, 1]).min())


@lru_cache(maxsize=32)
def load_with_peft(base: Path, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The base in fp32 with the adapter on it (not merged). Cached by path: do not rewrite a folder in place."""
    # Falcon's eager attention adds ALiBi twice.
    own = "sdpa" if AutoConfig.from_pretrained(base).model_type == "falcon" else "eager"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=own).eval()
    model.generation_config.eos_token_id = None
    if adapter is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied embeddings
        return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def generate_with_peft(
    base: Path,
    adapter: Path | None,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    eos_token_id: int | None = None,
    **options: Any,
) -> Generation:
    """Greedy decoding of one prompt. Runs to `max_new_tokens` unless `eos_token_id` is given and comes.

    `options` go to `generate`; the logprobs are the model's own, whatever they do to its logits.
    """
    model = load_with_peft(base, adapter)
    prompt = torch.tensor([list(prompt_ids)])
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = tuple(output.sequences[0, prompt.shape[1] :].tolist())
    return Generation(tokens, torch.cat(output.logits).float().log_softmax(dim=-1))


@torch.no_grad()
def prompt_logprobs_with_peft(
    base: Path, adapter: Path | None, token_ids: Sequence[int], *, max_model_len: int | None = None
) -> Tensor:
    """(len(token_ids), vocab) float32: the distribution after each token, from one forward pass without a cache.

    Transformers lets longrope and dynamic RoPE choose frequencies by the longest position of a pass; a worker chooses
    by its `max_model_len`. Give that, and a second line of the pass stands at the last positions that there can be.
    """
    model = load_with_peft(base, adapter)
    if max_model_len is None:
        logits: Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    else:
        positions = torch.arange(len(token_ids))
        both = torch.stack([positions, positions + max_model_len - len(token_ids)])
        input_ids = torch.tensor([list(token_ids)] * 2)
        # With a mask, lest transformers take positions that do not begin at 0 for packed sequences.
        mask = torch.ones_like(input_ids)
        logits = model(input_ids=input_ids, attention_mask=mask, position_ids=both, use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)
