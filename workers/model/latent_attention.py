"""Attention to latents on pages: keys and values of heads are never made (DeepSeek's latent attention).

A page keeps the normed latent of a token and the rotated part of its key. A linear module (`kv_b_proj`) would make the
rest of each head's key and its value of that. Here its part for keys is absorbed: queries are multiplied with it. All
heads then attend to one head of keys, whose first columns are the values, and the sums of latents go through the part
for values. Transformers' own code makes queries, latents and angles, and does what follows. Queries and keys are
rotated when latents are written.

LoRA on the module is applied to both halves by the adapter of the query's row. That is exact, since all rows of a
sequence have one adapter. Activated LoRA has rows of two, and is refused on the module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafleet.kernels import fp8, head_lora
from lorafleet.kernels.scores import Scores
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import HeadColumns
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.model import latent_rotation
from lorafleet.workers.model.attention_calls import AttentionCall, expanding
from lorafleet.workers.model.latent_rotation import Angles, Deferred
from lorafleet.workers.model.lora_layers import FusedProjection, ProjectionSlice
from lorafleet.workers.model.paged_attention import AttentionContext, attend
from lorafleet.workers.step.batch import AttentionBatch

if TYPE_CHECKING:
    from lorafleet.kernels.latent import LatentWorkspace


class LatentAttention:
    """Attention of one layer to latents."""

    def __init__(
        self,
        projection: FusedProjection,
        call: AttentionCall,
        layer: int,
        context: AttentionContext,
        rotation: Deferred,
        workspace: LatentWorkspace | None,
    ) -> None:
        """`projection`: what makes keys and values of latents. `rotation`: the module's. `workspace`: on CUDA."""
        assert call.latent is not None
        self._projection, self._call, self._latent = projection, call, call.latent
        self._layer, self._context, self._rotation, self._workspace = layer, context, rotation, workspace
        plain = call.head_dim - call.latent.rotated
        self._step = plain + call.value_dim
        self._keys, self._values = HeadColumns(0, self._step, plain), HeadColumns(plain, self._step, call.value_dim)
        weight = projection.weight
        if projection.fp8_weight is not None:
            weight = fp8.dequantise(projection.fp8_weight, projection.lora.pool.dtype)
        of_heads = weight.detach().view(call.num_heads, self._step, call.latent.rank)
        self._absorbing, self._expanding = of_heads[:, :plain], of_heads[:, plain:].transpose(1, 2)
        """(heads, plain, rank) and (heads, rank, value_dim)."""

    def __call__(self, query: Tensor, latents: Tensor, rotated: Tensor, scores: Scores) -> Tensor:
        """query: (heads, rows, head_dim). latents, rotated: (1, 1, rows, width). Returns (rows, heads, value_dim)."""
        self._check(query, latents, rotated, scores)
        projection, lora = self._projection, self._projection.lora
        segments = projection.context.segments_at(projection.place, projection.names[0], query.shape[1])
        plain, turned = torch.split(query, [self._keys.width, self._latent.rotated], dim=-1)
        if segments is not None:
            plain = self._scaled(plain, segments)
        absorbed = torch.bmm(plain, self._absorbing)
        if segments is not None:
            head_lora.add_absorbed(plain.transpose(0, 1), lora, segments, absorbed.transpose(0, 1), self._keys)
        own = [each if each.stride(-1) == 1 else each.contiguous() for each in (latents[0, 0], rotated[0, 0])]
        attended = self._attend(absorbed, turned, own[0], own[1], scores)
        values = torch.bmm(attended, self._expanding).transpose(0, 1)
        if segments is not None:
            head_lora.add_expanded(attended.transpose(0, 1), lora, segments, values, self._values)
            values = self._adjusted(values, segments)
        return values

    def _check(self, query: Tensor, latents: Tensor, rotated: Tensor, scores: Scores) -> None:
        """Raise UnsupportedModel when the layer calls otherwise than it did when it was first called."""
        rows = query.shape[1]
        wanted = (
            (self._call.num_heads, rows, self._call.head_dim),
            (1, 1, rows, self._latent.rank),
            (1, 1, rows, self._latent.rotated),
        )
        if tuple(tuple(each.shape) for each in (query, latents, rotated)) != wanted or not scores.is_plain:
            raise UnsupportedModel(
                f"layer {self._layer} attends with {tuple(query.shape)} to latents of {tuple(latents.shape)} and "
                f"{tuple(rotated.shape)}, by {scores}: that is not what it did when it was first called"
            )

    def _attend(self, absorbed: Tensor, turned: Tensor, latents: Tensor, rotated: Tensor, scores: Scores) -> Tensor:
        """absorbed: (heads, rows, rank). turned: (heads, rows, rotated). latents, rotated: (rows, width).

        Returns sums of latents, (heads, rows, rank).
        """
        batch, place = self._context.batch, self._context.place(self._layer)
        assert batch is not None
        angles = self._rotation.take()
        if self._workspace is not None:
            own = latents, rotated
            return _attend_cuda((absorbed, turned), own, angles, place.keys, batch, self._workspace, scores)
        if angles is not None:
            turned, rotated = (latent_rotation.rotated(each, angles) for each in (turned, rotated))
        place.keys[batch.row_pages, 0, batch.row_offsets] = torch.cat((latents, rotated), dim=-1)
        query = torch.cat((absorbed, turned), dim=-1).transpose(0, 1)
        attended = attend(query, self._context, self._layer, scores)
        return attended[..., : self._latent.rank].transpose(0, 1)

    def _scaled(self, query: Tensor, segments: Segments) -> Tensor:
        """Queries, (heads, rows, plain), times what adapters of the pass multiply the keys' columns with (DoRA).

        What they add to the columns adds the same to all scores of a row, which leaves the weights as they are.
        """
        if not self._has_vectors:
            return query
        wide = self._whole(query.transpose(0, 1), self._keys)
        added = torch.zeros_like(wide)
        self._projection._adjust(added, segments)
        self._projection._adjust(wide, segments)
        return self._columns(wide - added, self._keys).transpose(0, 1)

    def _adjusted(self, values: Tensor, segments: Segments) -> Tensor:
        """Values, (rows, heads, value_dim), with what adapters of the pass do to the module's output."""
        if not self._has_vectors:
            return values
        wide = self._whole(values, self._values)
        self._projection._adjust(wide, segments)
        return self._columns(wide, self._values)

    @property
    def _has_vectors(self) -> bool:
        return bool(self._projection.context.has_extras) and self._projection.lora.vectors is not None

    def _whole(self, part: Tensor, columns: HeadColumns) -> Tensor:
        """(rows, heads, width) -> (rows, out_dim), zero in other columns."""
        whole = part.new_zeros(part.shape[0], part.shape[1], self._step)
        whole[..., columns.first : columns.first + columns.width] = part
        return whole.flatten(1)

    def _columns(self, whole: Tensor, columns: HeadColumns) -> Tensor:
        """The other way."""
        of_heads = whole.view(whole.shape[0], -1, self._step)
        return of_heads[..., columns.first : columns.first + columns.width]


def _attend_cuda(
    query: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    angles: Angles | None,
    keys: Tensor,
    batch: AttentionBatch,
    workspace: LatentWorkspace,
    scores: Scores,
) -> Tensor:
    """query: absorbed and rotated parts, (heads, rows, width). own: latents and rotated parts, (rows, width).

    With angles the rotated parts are still to be rotated, and those of queries are, in place. Returns sums of latents,
    (heads, rows, rank).
    """
    from lorafleet.kernels import latent as kernels

    kernels.store(*own, keys, batch.row_pages, batch.row_offsets, query[1].transpose(0, 1), angles)
    sums = torch.empty_like(query[0], memory_format=torch.contiguous_format)
    absorbed, turned, out = (each.transpose(0, 1) for each in (*query, sums))
    num, lengths, tables = batch.num_decodes, batch.context_lengths, batch.block_tables
    how: dict[str, Any] = {"scaling": scores.scaling, "window": scores.window}
    if num:
        decoding = absorbed[:num], turned[:num], keys, tables[:num], lengths[:num], out[:num]
        kernels.decode(*decoding, workspace, **how)
    if num < lengths.shape[0]:
        # After the decodes, since a graph's empty lines write zeros where rows of prompts may be.
        indptr = batch.query_indptr[num:]
        kernels.extend(absorbed, turned, keys, tables[num:], lengths[num:], indptr, out, **how)
    return sums


def install(model: PreTrainedModel, context: AttentionContext) -> frozenset[str]:
    """Have every layer whose pages keep latents attend to those. The leaves of `model` are substituted already.

    Returns names of the modules that are taken apart.
    """
    names = {module: name for name, module in model.named_modules()}
    absorbed = set()
    workspaces: dict[tuple[int, int], LatentWorkspace | None] = {}
    for module in expanding(model):
        layer = module.layer_idx
        assert isinstance(layer, int)
        call = context.calls.get(layer)
        if call is not None and call.latent is not None:
            slice_ = module.kv_b_proj
            assert isinstance(slice_, ProjectionSlice)
            shape = call.num_heads, call.latent.rank
            if shape not in workspaces:
                workspaces[shape] = _workspace(*shape, context.cache.keys[layer].device)
            rotation = latent_rotation.defer(module, call.latent.rotated)
            attention = LatentAttention(slice_.fused, call, layer, context, rotation, workspaces[shape])
            context.latents[layer] = attention
            module.__dict__["expand_kv"] = _as_they_are
            absorbed.add(names[slice_])
    return frozenset(absorbed)


def _workspace(num_heads: int, rank: int, device: torch.device) -> LatentWorkspace | None:
    """Shared by layers of one shape, since a stream runs them in turn."""
    if device.type == "cpu":
        return None
    from lorafleet.kernels.latent import LatentWorkspace

    return LatentWorkspace.allocate(num_heads=num_heads, rank=rank, device=device)


def _as_they_are(latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for a module's `expand_kv`: attention is handed these in the place of keys and values."""
    return latents, rotated
