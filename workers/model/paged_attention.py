"""Attention over paged KV: for fused layers, and for any other module through transformers' attention registry.

The new keys and values are in their pages already when `attend` looks along each sequence's block table. CUDA runs
Triton kernels; torch's own attention serves the CPU and is the oracle. Rows are the step's tokens, one sequence after
another, decodes (one row each) first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lorafleet.kernels import fused
from lorafleet.kernels.kv_place import KVPlace
from lorafleet.kernels.launching import computes
from lorafleet.kernels.scores import Scores
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.model.attention_calls import AttentionCall
from lorafleet.workers.model.family_attention import adopt, choose, families_in
from lorafleet.workers.step.batch import AttentionBatch

if TYPE_CHECKING:
    from lorafleet.kernels.attention import DecodeWorkspace
    from lorafleet.kernels.attention_cudnn import PromptAttention, Prompts

IMPLEMENTATION = "lorafleet_paged"
MASKED = "lorafleet_paged_masked"
"""The same for models that look into a mask: theirs hides nothing."""


class Pages(NamedTuple):
    """One layer's keys, or its values, on the pages of the cache."""

    values: Tensor
    """(num_pages, num_kv_heads, page_tokens, head_dim)."""
    scales: Tensor | None
    """(num_pages, num_kv_heads, page_tokens) float32, if they are in fp8."""


@dataclass(slots=True)
class AttentionContext:
    """The KV cache, and the batch of the running forward pass. The runner sets the batch."""

    cache: KVCache
    calls: Mapping[int, AttentionCall]
    """How each layer calls attention. Its window counts, whatever the layer itself says in a call."""
    batch: AttentionBatch | None = None
    prompts: Prompts | None = None
    """Of the batch, where `prompt_attention` attends to its prompts."""
    prompt_attention: PromptAttention | None = None
    """None where there is no cuDNN for it."""
    workspaces: Mapping[int, DecodeWorkspace] = field(default_factory=dict)
    """Of each layer, on CUDA; layers of one shape share theirs, since a stream runs them in turn."""
    latents: dict[int, Callable[[Tensor, Tensor, Tensor, Scores], Tensor]] = field(default_factory=dict)
    """Of each layer whose pages keep latents, what attends to them; called as `LatentAttention` is."""

    def begin(self, batch: AttentionBatch) -> None:
        """A forward pass of this batch begins."""
        self.batch, self.prompts = batch, None
        # A graph serves prompts of any length in one launch, for which cuDNN has no plan.
        if self.prompt_attention is None or not computes() or torch.cuda.is_current_stream_capturing():
            return
        first = batch.num_decodes
        if first < len(batch.query_lengths):
            self.prompts = self.prompt_attention.prompts(
                batch.query_indptr[first:],
                batch.context_lengths[first:],
                batch.block_tables[first:],
                batch.query_lengths[first:],
                batch.host_context_lengths[first:],
            )

    def extends(self, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, scores: Scores) -> bool:
        """Attend to the batch's prompts by cuDNN. Return False, and do nothing, where that is another's part."""
        if self.prompts is None or self.prompt_attention is None:
            return False
        return self.prompt_attention.extend(query, keys, values, self.prompts, out, scores)

    def end(self) -> None:
        """It is over."""
        self.batch = self.prompts = None

    def place(self, layer: int) -> KVPlace:
        """Place in `layer`'s cache of the running pass's keys and values."""
        batch = self.batch
        assert batch is not None, "a forward pass outside the runner"
        keys, values = self.pages(layer)
        return KVPlace(keys.values, values.values, batch.row_pages, batch.row_offsets, keys.scales, values.scales)

    def pages(self, layer: int) -> tuple[Pages, Pages]:
        """Keys and values of `layer`."""
        cache = self.cache
        return (
            Pages(cache.keys[layer], None if cache.key_scales is None else cache.key_scales[layer]),
            Pages(cache.values[layer], None if cache.value_scales is None else cache.value_scales[layer]),
        )


def install(model: PreTrainedModel, context: AttentionContext, max_model_len: int) -> None:
    """Make every attention module of `model` use paged attention over `context`."""
    for name in (IMPLEMENTATION, MASKED):
        AttentionInterface.register(name, paged_attention)
    AttentionMaskInterface.register(MASKED, _no_mask)
    choose(model, MASKED if any(each.needs_mask for each in families_in(model)) else IMPLEMENTATION)
    adopt(model, IMPLEMENTATION, max_model_len)
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.__dict__["attention_context"] = context
    if context.calls and context.cache.keys[0].is_cuda:
        from lorafleet.kernels import attention_cudnn

        cache = context.cache
        device, max_pages = cache.keys[0].device, cache.pages_for(max_model_len + 1)
        context.workspaces = _workspaces(context.calls, device)
        context.prompt_attention = attention_cudnn.find(
            max_pages=max_pages, page_tokens=cache.page_tokens, device=device
        )


def _no_mask(*, device: torch.device, **_: object) -> Tensor:
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def _workspaces(calls: Mapping[int, AttentionCall], device: torch.device) -> dict[int, DecodeWorkspace]:
    from lorafleet.kernels.attention import DecodeWorkspace

    made: dict[tuple[int, int, int], DecodeWorkspace] = {}
    workspaces = {}
    for layer, call in calls.items():
        if call.latent is not None:
            continue
        shape = call.num_heads, call.num_kv_heads, call.width
        if shape not in made:
            made[shape] = DecodeWorkspace.allocate(
                num_heads=call.num_heads, num_kv_heads=call.num_kv_heads, head_dim=call.width, device=device
            )
        workspaces[layer] = made[shape]
    return workspaces


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    key_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention of one layer; the signature is that of transformers' attention functions.

    query: (1, num_heads, num_rows, head_dim); key: (1, num_kv_heads, num_rows, head_dim); value: the same with
    value_dim. `s_aux`: what `Scores` calls sinks; `key_bias`: as there. `attention_mask` is None: what a row attends to
    follows from the batch. Returns (1, num_rows, num_heads, value_dim).
    """
    context: AttentionContext = module.__dict__["attention_context"]
    layer = module.layer_idx
    assert isinstance(layer, int)
    call = context.calls.get(layer)
    if call is None:
        raise UnsupportedModel(f"layer {layer} attends, though it did not when the model was first called")
    scores = Scores(call.head_dim**-0.5 if scaling is None else scaling, call.window, softcap, s_aux, key_bias)
    if call.latent is not None:
        return context.latents[layer](query[0], key, value, scores)[None], None
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    _check_heads(query, key, value, call, layer)
    if call.value_dim != call.head_dim:
        # On pages both are as wide as the wider, with zeros that add nothing.
        query, key, value = (F.pad(each, (0, call.width - each.shape[-1])) for each in (query, key, value))
    fused.store(key, value, context.place(layer))
    attended = attend(query, context, layer, scores)
    return attended[..., : call.value_dim].unsqueeze(0), None


def _check_heads(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, layer: int) -> None:
    """Raise UnsupportedModel when the layer calls with other shapes than those that the cache was made for.

    query: (num_rows, num_heads, head_dim); key: (num_rows, num_kv_heads, head_dim); value: with value_dim.
    """
    kept = (query.shape[0], call.num_kv_heads)
    if (
        (*kept, call.head_dim) != key.shape
        or (*kept, call.value_dim) != value.shape
        or query.shape[1] != call.num_heads
    ):
        raise UnsupportedModel(
            f"layer {layer} attends with {query.shape[1]} heads to keys of {tuple(key.shape)} for {query.shape[0]} "
            f"tokens, where it had {call.num_heads} heads and {call.num_kv_heads} of keys when it was first called"
        )


def attend(query: Tensor, context: AttentionContext, layer: int, scores: Scores) -> Tensor:
    """Causal attention of the running pass's rows over `layer`'s pages, which hold the rows' keys and values already.

    query: (num_rows, num_heads, head_dim), rows may be strided. Returns (num_rows, num_heads, head_dim), contiguous.
    """
    batch = context.batch
    assert batch is not None, "a forward pass outside the runner"
    keys, values = context.pages(layer)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.is_cuda:
        _attend_cuda(query, keys, values, context, layer, scores, out)
    else:
        _decode(query, keys, values, batch, scores, out)
        _prefill(query, keys, values, batch, scores, out)
    return out


def _attend_cuda(
    query: Tensor,
    keys: Pages,
    values: Pages,
    context: AttentionContext,
    layer: int,
    scores: Scores,
    out: Tensor,
) -> None:
    from lorafleet.kernels import attention as kernels

    batch = context.batch
    assert batch is not None
    num, lengths, tables = batch.num_decodes, batch.context_lengths, batch.block_tables
    how: dict[str, Any] = {
        "scaling": scores.scaling,
        "window": scores.window,
        "softcap": scores.softcap,
        "sinks": scores.sinks,
        "key_bias": scores.key_bias,
        "key_scales": keys.scales,
        "value_scales": values.scales,
    }
    paged = keys.values, values.values
    if num:
        kernels.decode(query[:num], *paged, tables[:num], lengths[:num], out[:num], context.workspaces[layer], **how)
    # After the decodes, since a graph's empty lines write zeros where rows of prompts may be.
    if num < lengths.shape[0] and not context.extends(query, *paged, out, scores):
        kernels.extend(query, *paged, tables[num:], lengths[num:], batch.query_indptr[num:], out, **how)


def _decode(query: Tensor, keys: Pages, values: Pages, batch: AttentionBatch, scores: Scores, out: Tensor) -> None:
    """All one-row sequences in one call: the query heads of a KV head stand in the place of query positions."""
    num = batch.num_decodes
    if num == 0:
        return
    num_pages = -(-max(batch.host_context_lengths[:num]) // keys.values.shape[2])
    if num_pages == 0:
        out[:num] = 0
        return
    table = batch.block_tables[:num, :num_pages]
    if (-1, keys.values.shape[1]) not in batch.gathers:
        table = _own_pages(table, batch.context_lengths[:num], keys.values.shape[2])
    window = scores.window
    mask = batch.masks.get((-1, window))
    if mask is None:
        lengths = batch.context_lengths[:num, None]
        positions = torch.arange(num_pages * keys.values.shape[2], device=query.device)
        mask = positions < lengths
        if window is not None:
            mask &= positions >= lengths - window
        batch.masks[-1, window] = mask = mask[:, None, None, :]
    grouped = query[:num].reshape(num, keys.values.shape[1], -1, query.shape[-1])
    rows = _rows_to_gather(batch, -1, keys.values, table)
    attended = _weigh(
        grouped, _gather(keys, rows, num, query.dtype), _gather(values, rows, num, query.dtype), mask, scores
    )
    out[:num] = attended.reshape(num, query.shape[1], -1)


def _prefill(query: Tensor, keys: Pages, values: Pages, batch: AttentionBatch, scores: Scores, out: Tensor) -> None:
    """Sequences with several rows, one after another."""
    start = sum(batch.query_lengths[: batch.num_decodes])
    page_tokens, window = keys.values.shape[2], scores.window
    for index in range(batch.num_decodes, len(batch.query_lengths)):
        num_rows, length = batch.query_lengths[index], batch.host_context_lengths[index]
        if length == 0:
            out[start : start + num_rows] = 0
            start += num_rows
            continue
        table = batch.block_tables[index : index + 1, : -(-length // page_tokens)]
        mask = batch.masks.get((index, window))
        if mask is None:
            own = torch.arange(length - num_rows, length, device=query.device)[:, None]
            positions = torch.arange(length, device=query.device)
            mask = positions <= own
            if window is not None:
                mask &= positions > own - window
            batch.masks[index, window] = mask
        rows = _rows_to_gather(batch, index, keys.values, table)
        attended = _weigh(
            query[None, start : start + num_rows].transpose(1, 2),
            _gather(keys, rows, 1, query.dtype)[:, :, :length],
            _gather(values, rows, 1, query.dtype)[:, :, :length],
            mask,
            scores,
        )
        out[start : start + num_rows] = attended[0].transpose(0, 1)
        start += num_rows


def _weigh(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Attention in torch.

    query: (sequences, heads, rows, head_dim); key, value: (sequences, KV heads, tokens, head_dim).
    A query of as many heads as there are KV heads may have the heads of each in the place of rows. Returns the shape
    of `query`.
    """
    is_grouped = query.shape[1] != key.shape[1]
    bias = None
    if scores.key_bias is not None:
        known, num_tokens = scores.key_bias.shape[1], key.shape[2]
        # Beyond the longest sequence there may be the rest of a page, which nobody attends to.
        bias = (
            scores.key_bias[:, :num_tokens] if known >= num_tokens else F.pad(scores.key_bias, (0, num_tokens - known))
        )
        bias = bias[:, None] if len(bias) == query.shape[1] else bias.view(query.shape[1], -1, num_tokens)
    if scores.softcap is None and scores.sinks is None:
        if bias is not None:
            mask = torch.where(mask, bias.to(query.dtype), float("-inf"))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scores.scaling, enable_gqa=is_grouped
        )
    if is_grouped:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    products = (query @ key.transpose(-1, -2)).float() * scores.scaling
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    if bias is not None:
        products = products + bias
    products = products.masked_fill(~mask, float("-inf"))
    if scores.sinks is not None:
        per_row = scores.sinks.numel() == query.shape[1]
        sinks = scores.sinks.float().view((1, -1, 1, 1) if per_row else (1, query.shape[1], -1, 1))
        products = torch.cat([products, sinks.expand(*products.shape[:-1], 1)], dim=-1)
    weights = products.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def _own_pages(table: Tensor, lengths: Tensor, page_tokens: int) -> Tensor:
    """The table, with a sequence's first page in all places behind its length.

    What stands there is another sequence's page, which may hold what is not finite, and a probability of zero times
    that is no number.
    """
    columns = torch.arange(table.shape[1], device=table.device) * page_tokens
    return torch.where(columns < lengths[:, None], table, table[:, :1])


def _rows_to_gather(batch: AttentionBatch, index: int, cache: Tensor, table: Tensor) -> Tensor:
    """Of a cache as rows of one head of one page: those of the table's pages, by sequence, head and page."""
    num_heads = cache.shape[1]
    rows = batch.gathers.get((index, num_heads))
    if rows is None:
        heads = torch.arange(num_heads, device=table.device)[:, None]
        rows = batch.gathers[index, num_heads] = (table[:, None, :] * num_heads + heads).flatten()
    return rows


def _gather(pages: Pages, rows: Tensor, num_sequences: int, dtype: torch.dtype) -> Tensor:
    """(pages, kv_heads, page_tokens, head_dim) -> (sequences, kv_heads, tokens, head_dim) in `dtype`, copied once."""
    cache, scales = pages
    num_heads, page_tokens, head_dim = cache.shape[1:]
    if scales is None:
        gathered = cache.view(-1, page_tokens * head_dim).index_select(0, rows)
    else:
        # As bytes, which torch can index.
        taken = cache.view(torch.uint8).view(-1, page_tokens * head_dim).index_select(0, rows).view(cache.dtype)
        of_tokens = scales.view(-1, page_tokens).index_select(0, rows)
        gathered = (taken.view(*of_tokens.shape, head_dim).float() * of_tokens[..., None]).to(dtype)
    return gathered.view(num_sequences, num_heads, -1, head_dim)
