"""Substitutes for the base's linear and embedding modules that add each row's own adapter.

A model keeps transformers' own forward; only these leaves change. Modules that share their input are computed by one
fused product and one csgmv, and hand out their slices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafleet.adapter_store.manifest import appended_to
from lorafleet.kernels import fp8, ops, reference
from lorafleet.kernels.adjust import adjust
from lorafleet.kernels.fp8_values import Fp8Rows
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import LoraEmbeddingWeights, LoraWeights
from lorafleet.workers.memory.extra_rows import ExtraMatrix
from lorafleet.workers.model.forked_delta import ForkedDelta, forks
from lorafleet.workers.model.lora_context import LoraContext, Owner, Place, place_of
from lorafleet.workers.model.quantisation import packed
from lorafleet.workers.ranks import Ranks


class FusedProjection(nn.Module):
    """One product for the modules of a group: y = x W^T + bias + each row's own B A x.

    Rows of an adapter that replaces the head's matrix have that in W's place; rows of one that scales a module's output
    or adds to it have that done last.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        linears: list[nn.Module],
        weights: LoraWeights,
        context: LoraContext,
        *,
        place: Place,
        is_head: bool,
        ranks: Ranks | None = None,
        is_sum: bool = False,
    ) -> None:
        """`is_head`: whether it is the output embedding, whose matrix an adapter may replace.

        ranks: those that have the other parts, if this is a part. It is one of the outputs; with `is_sum` one of the
        inputs, and all ranks' outputs are added up. A head's outputs are put side by side.
        """
        super().__init__()
        self.sums = ranks if is_sum else None
        self.gathers = ranks if is_head and not is_sum else None
        self.names = names
        matrices = [_matrix(linear) for linear in linears]
        self.widths = [matrix.shape[0] for matrix in matrices]
        self.fp8_weight = packed(linears)
        # A group of one keeps its very tensor: it may be tied to the embedding.
        self.weight: Tensor = matrices[0]
        if self.fp8_weight is not None:
            self.weight = nn.Parameter(self.fp8_weight.values, requires_grad=False)
        elif len(matrices) > 1:
            self.weight = nn.Parameter(torch.cat(matrices), requires_grad=False)
        biases = [_bias(linear) for linear in linears]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = [
                bias if bias is not None else matrix.new_zeros(matrix.shape[0], dtype=weights.pool.dtype)
                for bias, matrix in zip(biases, matrices, strict=True)
            ]
            self.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
        self.lora = weights
        self.context = context
        self.place: Place = place
        self.is_head = is_head

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_dim) -> (..., sum of the members' widths).

        A head's output is wider where adapters of the pass have tokens that the base lacks: those come last, with
        anything in the rows of others.
        """
        rows = x.reshape(-1, x.shape[-1])
        y, scales = self.unscaled(rows)
        if scales is not None:
            fp8.rescale(y, scales)
        return y.view(*x.shape[:-1], y.shape[-1])

    def unscaled(self, x: Tensor, in_fp8: Fp8Rows | None = None) -> tuple[Tensor, Tensor | None]:
        """x: (rows, in_dim), also in fp8 where the caller has it -> (rows, sum of the members' widths).

        Returns the output, and (rows,) what it is still to be multiplied with: who reads it next does that by the way.
        """
        if self.fp8_weight is None:
            return self._product(x), None
        if in_fp8 is None:
            in_fp8 = fp8.quantise_rows(x)
        segments = self.context.segments_at(self.place, self.names[0], x.shape[0])
        own_bias = self.bias if self.sums is None else None
        # Adapters see the input as it is.
        delta = ForkedDelta(x, self.lora, segments) if segments is not None and forks(x) else None
        y, scales = fp8.product(in_fp8, self.fp8_weight, own_bias)
        bias = None if scales is None else own_bias
        if segments is not None:
            if delta is None:
                # Expand comes up while shrink runs, if nothing stands between them.
                h = ops.shrink(x, self.lora, segments)
                ops.expand(h, self.lora, segments, y, bias=bias, scales=scales)
            elif scales is None:
                y.add_(delta.joined())
            else:
                fp8.rescale(y, scales, bias, delta=delta.joined())
            y = self._summed_copy(y)
            self._adjust(y, segments)
            return y, None
        if self.sums is not None:
            return self._summed_copy(y if scales is None else fp8.rescale(y, scales)), None
        if scales is not None and bias is not None:
            return fp8.rescale(y, scales, bias), None
        return y, scales

    def _product(self, rows: Tensor) -> Tensor:
        """rows: (rows, in_dim) -> (rows, sum of the members' widths)."""
        segments = self.context.segments_at(self.place, self.names[0], rows.shape[0])
        # Only one of a sum's terms would have it.
        bias = self.bias if self.sums is None else None
        if segments is None:
            if self.sums is None:
                return self._gathered(F.linear(rows, self.weight, bias))
            y = self.sums.partial(rows.shape[0], self.weight.shape[0], rows)
            return self._summed(torch.mm(rows, self.weight.t(), out=y))
        has_extras, own = self.context.has_extras, self.lora.matrix if self.is_head else None
        if rows.is_cuda:
            shape = rows.shape[0], self.weight.shape[0]
            y = rows.new_empty(shape) if self.sums is None else self.sums.partial(*shape, rows)
            if forks(rows) and not has_extras:
                delta = ForkedDelta(rows, self.lora, segments, bias)
                torch.mm(rows, self.weight.t(), out=y)
                y.add_(delta.joined())
            else:
                # The delta first, the base product onto it: beta = 1 costs cuBLAS nothing, and expand does not read y.
                h = ops.shrink(rows, self.lora, segments)
                ops.expand(h, self.lora, segments, y, accumulate=False, bias=bias)
                if has_extras and own is not None:
                    from lorafleet.kernels import own_triton

                    y.addmm_(own_triton.without_own(rows, own, segments), self.weight.t())
                    own_triton.add_product(rows, y, own, segments)
                else:
                    y.addmm_(rows, self.weight.t())
        else:
            y = F.linear(rows, self.weight, bias)
            for at, matrix in self._replaced(self.context.owners(segments)):
                # A head's: few rows of it are to have the bits that they have among many.
                product = matrix.product(reference.padded(rows.index_select(0, at)))[: len(at)]
                y.index_copy_(0, at, product if bias is None else product.add_(bias))
            ops.add_lora(rows, self.lora, segments, y)
        y = self._summed(y)
        self._adjust(y, segments)
        y = self._gathered(y)
        return self._with_appended(rows, y, segments) if has_extras and self.is_head else y

    def _summed(self, y: Tensor) -> Tensor:
        """The output of all ranks together, where each has a term of it; low-rank factors are in the terms already."""
        if self.sums is None:
            return y
        y = self.sums.all_reduce(y)
        return y if self.bias is None else y.add_(self.bias)

    def _summed_copy(self, y: Tensor) -> Tensor:
        """The same of an output that does not lie where sums cost least."""
        return y if self.sums is None else self._summed(self.sums.partial(y.shape[0], y.shape[1], y).copy_(y))

    def _gathered(self, y: Tensor) -> Tensor:
        return y if self.gathers is None else self.gathers.gather_columns(y)

    def _adjust(self, y: Tensor, segments: Segments) -> None:
        """Apply what adapters of the pass have beside low-rank factors: rows added to the output, and its scales."""
        if self.context.has_extras and self.lora.vectors is not None:
            adjust(y, self.lora.vectors, segments, self.bias)

    def _with_appended(self, x: Tensor, y: Tensor, segments: Segments) -> Tensor:
        """y, and after it the columns of the tokens that adapters have and the base lacks, if any has some."""
        found = [
            (owner.rows, matrix)
            for owner in self.context.owners(segments)
            if isinstance(matrix := owner.extras.get(appended_to(self.names[0])), ExtraMatrix)
        ]
        if not found:
            return y
        columns = y.new_zeros((len(y), max(len(matrix.starts) for _, matrix in found)))
        for rows, matrix in found:
            columns[rows, : len(matrix.starts)] = matrix.product(x.index_select(0, rows))
        return torch.cat((y, columns), dim=1)

    def _replaced(self, owners: tuple[Owner, ...]) -> list[tuple[Tensor, ExtraMatrix]]:
        """Rows that have a matrix of their own, and the matrix."""
        found = [(owner.rows, owner.extras.get(f"{self.names[0]}.weight")) for owner in owners if self.is_head]
        return [(rows, matrix) for rows, matrix in found if isinstance(matrix, ExtraMatrix)]


class ProjectionSlice(nn.Module):
    """A member of a fused group. The first to be called computes for all; the others hand out what it made."""

    def __init__(self, index: int, fused: FusedProjection, siblings: list[tuple[Tensor, tuple[Tensor, ...]]]) -> None:
        super().__init__()
        self.index = index
        self.siblings = siblings
        if index == 0:
            self.fused = fused
        else:
            # Held by the first member alone, so that the model's parameters are counted once.
            self.__dict__["fused"] = fused

    @property
    def weight(self) -> Tensor:
        """(out_dim, in_dim): some models look at their projections' weights."""
        return torch.split(self.fused.weight, self.fused.widths)[self.index]

    @property
    def weight_scales(self) -> Tensor | None:
        """(out_dim,) float32, what the rows of `weight` are to be multiplied with where they are in fp8."""
        packed_weight = self.fused.fp8_weight
        return None if packed_weight is None else torch.split(packed_weight.scales, self.fused.widths)[self.index]

    def forward(self, x: Tensor) -> Tensor:
        if len(self.fused.widths) == 1:
            return self._compute(x)
        if not self.siblings or self.siblings[0][0] is not x:
            self.siblings[:] = [(x, torch.split(self._compute(x), self.fused.widths, dim=-1))]
        out = self.siblings[0][1][self.index]
        if self.index == len(self.fused.widths) - 1:
            self.siblings.clear()  # nothing is kept alive past its layer
        return out

    def _compute(self, x: Tensor) -> Tensor:
        y: Tensor = self.fused(x)
        return y


class LoraEmbedding(nn.Module):
    """The token embedding, or the one that a row's adapter has in its place, plus each row's own B A[:, token].

    What a subclass scales (Gemma) is the sum of both, as in PEFT.
    """

    def __init__(
        self,
        name: str,
        base: nn.Embedding,
        weights: LoraEmbeddingWeights,
        context: LoraContext,
        *,
        ranks: Ranks | None = None,
        first_token: int = 0,
    ) -> None:
        """ranks: those that have the other tokens, if `base` has those from `first_token` on only."""
        super().__init__()
        self.ranks = ranks
        self.first_token = first_token
        self.base = base
        self.name = name
        self.replaced = f"{name}.weight"
        self.lora = weights
        self.context = context

    @property
    def weight(self) -> Tensor:
        """(num_embeddings, embedding_dim): the head may be tied to it."""
        return self.base.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: (...) int64 -> (..., embedding_dim)."""
        if self.ranks is not None:
            return self._of_all_ranks(token_ids, self.ranks)
        known = token_ids
        if self.context.has_extras:
            # Tokens that the base lacks are looked up below, in the rows of adapters that have them.
            known = token_ids.clamp(max=self.base.num_embeddings - 1)
        segments = self.context.segments_at("body", self.name, token_ids.numel())
        scale = None if segments is None else getattr(self.base, "embed_scale", None)
        y: Tensor = self.base(known) if scale is None else F.embedding(known, self.weight)
        if segments is not None:
            tokens, rows = known.reshape(-1), y.view(-1, y.shape[-1])
            if self.context.has_extras:
                self._replace(tokens, rows, segments)
                self._append(token_ids.reshape(-1), rows, segments)
            ops.embed(tokens, self.lora, segments, rows)
            if self.context.has_extras and self.lora.vectors is not None:
                adjust(rows, self.lora.vectors, segments)
        return y if scale is None else _times(y, scale)

    def _of_all_ranks(self, token_ids: Tensor, ranks: Ranks) -> Tensor:
        """As `forward`, where each rank has some of the tokens: a row is the sum of theirs, all but one zero."""
        num_tokens = self.base.num_embeddings
        # Tokens that the base lacks stand for its last one, as in `forward`, until their own rows are put in.
        known = token_ids.reshape(-1).clamp(max=ranks.size * num_tokens - 1) - self.first_token
        is_here = (known >= 0) & (known < num_tokens)
        y = ranks.partial(len(known), self.weight.shape[1], self.weight)
        torch.index_select(self.weight, 0, known.clamp(0, num_tokens - 1), out=y).masked_fill_(~is_here[:, None], 0.0)
        segments = self.context.segments_at("body", self.name, token_ids.numel())
        if segments is not None:
            if self.context.has_extras:
                self._replace(known, y, segments)
                self._append(token_ids.reshape(-1), y, segments)
            ops.embed(known, self.lora, segments, y, is_part=True)
        y = ranks.all_reduce(y)
        if segments is not None and self.context.has_extras and self.lora.vectors is not None:
            adjust(y, self.lora.vectors, segments)
        y = y.view(*token_ids.shape, y.shape[-1])
        scale = getattr(self.base, "embed_scale", None)
        return y if scale is None else _times(y, scale)

    def _append(self, tokens: Tensor, y: Tensor, segments: Segments) -> None:
        """Put the rows of tokens that the base lacks into y. They are the first rank's, if there are several."""
        size = 1 if self.ranks is None else self.ranks.size
        for owner in self.context.owners(segments):
            matrix = owner.extras.get(appended_to(self.name))
            if isinstance(matrix, ExtraMatrix):
                own = tokens.index_select(0, owner.rows) - size * self.base.num_embeddings
                found = matrix.take(own.clamp(0, len(matrix.starts) - 1))
                if self.ranks is not None and not self.ranks.is_first:
                    found.zero_()
                y.index_copy_(0, owner.rows, torch.where((own >= 0)[:, None], found, y.index_select(0, owner.rows)))

    def _replace(self, tokens: Tensor, y: Tensor, segments: Segments) -> None:
        """Put what an adapter has in the embedding's place into its rows of y. Tokens that are not here are skipped."""
        if y.is_cuda and self.lora.matrix is not None:
            from lorafleet.kernels import own_triton

            own_triton.take_rows(tokens, y, self.lora.matrix, segments, self.base.num_embeddings)
            return
        for owner in self.context.owners(segments):
            matrix = owner.extras.get(self.replaced)
            if isinstance(matrix, ExtraMatrix):
                own, rows = tokens.index_select(0, owner.rows), owner.rows
                if self.ranks is not None:
                    is_here = (own >= 0) & (own < len(matrix.starts))
                    own, rows = own[is_here], rows[is_here]
                y.index_copy_(0, rows, matrix.take(own))


def substitute_projections(
    model: PreTrainedModel,
    names: tuple[str, ...],
    weights: LoraWeights,
    context: LoraContext,
    ranks: Ranks | None = None,
    *,
    is_sum: bool = False,
) -> None:
    """Put a fused projection in the places of `names`, which share their input. The rest as in `FusedProjection`."""
    is_head = model.get_output_embeddings() is model.get_submodule(names[0])
    linears = [model.get_submodule(name) for name in names]
    place = place_of(model, names[0])
    fused = FusedProjection(names, linears, weights, context, place=place, is_head=is_head, ranks=ranks, is_sum=is_sum)
    siblings: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    for index, name in enumerate(names):
        model.set_submodule(name, ProjectionSlice(index, fused, siblings))


def substitute_embedding(
    model: PreTrainedModel,
    name: str,
    weights: LoraEmbeddingWeights,
    context: LoraContext,
    ranks: Ranks | None = None,
    first_token: int = 0,
) -> None:
    """Put a LoRA embedding in the place of `name`. The rest as in `LoraEmbedding`."""
    base = model.get_submodule(name)
    assert isinstance(base, nn.Embedding)
    model.set_submodule(name, LoraEmbedding(name, base, weights, context, ranks=ranks, first_token=first_token))


def _times(y: Tensor, scale: object) -> Tensor:
    """Y times an embedding's scale."""
    if isinstance(scale, Tensor):
        return y * scale.to(y.dtype)
    assert isinstance(scale, float)
    return y * scale


def _bias(linear: nn.Module) -> Tensor | None:
    bias = linear.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def _matrix(linear: nn.Module) -> Tensor:
    """(out_dim, in_dim) of a linear module; GPT-2's Conv1D holds it transposed."""
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    if isinstance(linear, Conv1D):
        return nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
    return weight
