"""Attention of older families, whose own code computes it, sent through transformers' registry instead.

A family's attention modules get a subclass of their class, in which one method is replaced. What ALiBi adds to the
scores is made once, by transformers' own functions, and handed over as a table by head and position of the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Family(NamedTuple):
    """The change of a class of attention modules that sends it through the registry."""

    method: str
    """The one that is replaced."""
    replacement: Callable[..., Any]
    key_bias: Callable[[Any, int], Tensor | None] | None = None
    """(module, positions) -> (num_heads, positions) float32, or None where its configuration has none."""
    needs_mask: bool = False
    """Whether the model looks into the mask that it has made."""


@contextmanager
def adopted(model: PreTrainedModel, implementation: str, max_model_len: int) -> Iterator[None]:
    """Within it, such modules attend as `adopt` makes them."""
    own = {module: type(module) for module in model.modules() if type(module).__name__ in FAMILIES}
    adopt(model, implementation, max_model_len)
    try:
        yield
    finally:
        for module, cls in own.items():
            module.__class__ = cls


def adopt(model: PreTrainedModel, implementation: str, max_model_len: int) -> None:
    """Let the model's modules of a known family attend by transformers' `implementation`, over so many positions."""
    biases: dict[str, Tensor | None] = {}
    found = [module for module in model.modules() if type(module).__name__ in FAMILIES]
    for layer, module in enumerate(found):
        name = type(module).__name__
        family = FAMILIES[name]
        if family.key_bias is not None and name not in biases:
            biases[name] = family.key_bias(module, max_model_len)
        module.__dict__["attention_implementation"] = implementation
        module.__dict__["key_bias"] = biases.get(name)
        if not hasattr(module, "layer_idx"):
            module.__dict__["layer_idx"] = layer
        module.__class__ = type(f"Adopted{name}", (type(module),), {family.method: family.replacement})


def families_in(model: PreTrainedModel) -> list[Family]:
    """Those whose modules the model has, not adopted yet."""
    return [FAMILIES[name] for name in {type(module).__name__ for module in model.modules()} & FAMILIES.keys()]


def choose(model: PreTrainedModel, implementation: str) -> None:
    """Have the model attend by this one of transformers' implementations."""
    if families_in(model):
        model.config._attn_implementation = implementation  # transformers itself lets no such model change it
    else:
        model.set_attn_implementation(implementation)


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear module under another name; Falcon's differs in bfloat16's rounding alone."""
    return type(module).__name__ == "FalconLinear"


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """query, key, value: (1, heads, rows, head_dim) -> (1, rows, heads, head_dim)."""
    function = ALL_ATTENTION_FUNCTIONS[module.attention_implementation]
    bias = {} if module.key_bias is None else {"key_bias": module.key_bias}
    attended: Tensor = function(
        module, query.to(value.dtype), key.to(value.dtype), value, None, scaling=scaling, sliding_window=window, **bias
    )[0]
    return attended


def _merged(module: Any, qkv: Tensor, num_kv_heads: int, scaling: float, angles: Any = None) -> Tensor:
    """qkv: (1, rows, width), by KV head its query heads, its key and its value -> (1, rows, num_heads * head_dim)."""
    qkv = qkv.view(*qkv.shape[:2], num_kv_heads, module.num_heads // num_kv_heads + 2, module.head_dim)
    query = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)
    key, value = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)
    if angles is not None:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        query, key = apply_rotary_pos_emb(query, key, *angles)
    return _attend(module, query, key, value, scaling).flatten(2)


def _falcon(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """In place of `FalconAttention.forward`, for one key and value of all heads, of each, or of groups."""
    angles = position_embeddings if alibi is None else None
    merged = _merged(self, self.query_key_value(hidden_states), self.num_kv_heads, self.inv_norm_factor, angles)
    return self.dense(merged), None


def _bloom(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """In place of `BloomAttention.forward`."""
    merged = _merged(self, self.query_key_value(hidden_states), self.num_heads, self.inv_norm_factor)
    return self.dense(merged) + residual, None


def _mpt(self: Any, hidden_states: Tensor, position_bias: Tensor, **_: object) -> tuple[Tensor, None]:
    """In place of `MptAttention.forward`."""
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = qkv.view(*qkv.shape[:2], 3, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    return self.out_proj(_attend(self, query, key, value, self.softmax_scale).flatten(2)), None


def _xglm(self: Any, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
    """In place of `XGLMAttention.forward`, of a layer's own tokens."""
    shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
    query, key, value = (
        project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    return self.out_proj(_attend(self, query, key, value, self.scaling).flatten(2)), None


def _scaled(scaling: Callable[[Any], float], window: Callable[[Any], int | None] = lambda module: None) -> Any:
    """In place of an `_attn` whose arguments and result are (1, heads, rows, head_dim)."""

    def attend(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        return _attend(self, query, key, value, scaling(self), window(self)).transpose(1, 2), None

    return attend


def _falcon_bias(module: Any, num_positions: int) -> Tensor | None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    if not module.config.alibi:
        return None
    mask = torch.ones(1, num_positions, dtype=torch.int64, device=module.dense.weight.device)
    bias: Tensor = build_alibi_tensor(mask, module.num_heads, torch.float32)[:, 0] / math.sqrt(module.head_dim)
    return bias


def _bloom_bias(module: Any, num_positions: int) -> Tensor:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    mask = torch.ones(1, num_positions, dtype=torch.int64, device=module.dense.weight.device)
    bias: Tensor = build_alibi_tensor(mask, module.num_heads, torch.float32)[:, 0].contiguous()
    return bias


def _mpt_bias(module: Any, num_positions: int) -> Tensor:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    device = module.out_proj.weight.device
    bias: Tensor = build_mpt_alibi_tensor(module.n_heads, num_positions, device=device)[:, 0].contiguous()
    return bias


FAMILIES: Mapping[str, Family] = {
    "BloomAttention": Family("forward", _bloom, _bloom_bias),
    "CodeGenAttention": Family("_attn", _scaled(lambda module: 1 / module.scale_attn)),
    "FalconAttention": Family("forward", _falcon, _falcon_bias),
    "GPTJAttention": Family("_attn", _scaled(lambda module: 1 / module.scale_attn)),
    "GPTNeoSelfAttention": Family(
        "_attn",
        _scaled(lambda _: 1.0, lambda module: module.config.window_size if module.attention_type == "local" else None),
    ),
    "GPTNeoXJapaneseAttention": Family("_attn", _scaled(lambda module: 1 / module.norm_factor)),
    "MptAttention": Family("forward", _mpt, _mpt_bias, needs_mask=True),
    "XGLMAttention": Family("forward", _xglm),
}
"""By the class of transformers' attention module."""
