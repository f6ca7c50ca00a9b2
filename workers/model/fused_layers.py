"""Decoder layers of Llama's kind, run with one launch between every two products instead of transformers' own modules.

`substitute` exchanges a model's body (Llama, Mistral, Qwen2, Qwen3) for a `FusedBody`. Weights, embedding, final norm,
rotary module and head stay transformers' (or `lora_layers`'); a model of another kind is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lorafleet.kernels import fused
from lorafleet.kernels.fp8_values import Fp8Rows
from lorafleet.kernels.kv_place import HeadNorm, KVPlace
from lorafleet.kernels.scores import Scores
from lorafleet.workers.model.lora_layers import FusedProjection, ProjectionSlice
from lorafleet.workers.model.norm_layers import AdapterNorm
from lorafleet.workers.model.paged_attention import AttentionContext, attend

_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "llama.modeling_llama.Llama": lambda attention: None,
    "mistral.modeling_mistral.Mistral": lambda attention: getattr(attention.config, "sliding_window", None),
    "qwen2.modeling_qwen2.Qwen2": lambda attention: getattr(attention, "sliding_window", None),
    "qwen3.modeling_qwen3.Qwen3": lambda attention: getattr(attention, "sliding_window", None),
}
"""Kinds of models whose layers are computed here -> the sliding window that such a kind's attention module uses."""


class Output(NamedTuple):
    """Output of a projection, (rows, width), and (rows,) what it is still to be multiplied with."""

    values: Tensor
    scales: Tensor | None = None


class Input(NamedTuple):
    """Input of a projection, (rows, width), also in fp8 if that was made with it."""

    values: Tensor
    in_fp8: Fp8Rows | None = None


class FusedLayer(nn.Module):
    """One decoder layer. Its modules keep their names; those that the fused kernels replace give their weights only."""

    def __init__(
        self,
        layer: Any,
        projections: list[FusedProjection],
        index: int,
        window: int | None,
        context: AttentionContext,
    ) -> None:
        """`projections`: q/k/v, o, gate/up and down."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.input_layernorm: nn.Module = layer.input_layernorm
        self.self_attn: nn.Module = attention
        self.post_attention_layernorm: nn.Module = layer.post_attention_layernorm
        self.mlp: nn.Module = mlp
        # Registered above already, under the names of their members.
        self.__dict__["projections"] = projections
        self.head_norm = None
        if hasattr(attention, "q_norm"):
            query_norm, key_norm = attention.q_norm, attention.k_norm
            self.head_norm = HeadNorm(query_norm.weight, key_norm.weight, _untouched(query_norm).variance_epsilon)
        self.index = index
        self.scores = Scores(attention.scaling, window)
        self.context = context

    def forward(self, x: Output, residual: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Output, Tensor]:
        """x: (rows, width), what the layer before left to be added to `residual`; None at the first layer.

        Returns the same pair for the next layer; `residual` is changed in place.
        """
        qkv_proj, o_proj, gate_up_proj, down_proj = self.__dict__["projections"]
        normed = _norm(self.input_layernorm, x, residual, qkv_proj)
        if residual is None:
            residual = x.values
        query = self._rotate_and_store(_project(qkv_proj, normed), cos, sin)
        attended = attend(query, self.context, self.index, self.scores)
        x = _project(o_proj, Input(attended.flatten(1)))
        normed = _norm(self.post_attention_layernorm, x, residual, gate_up_proj)
        x = _project(down_proj, _silu_mul(_project(gate_up_proj, normed), down_proj))
        return x, residual

    def _rotate_and_store(self, qkv: Output, cos: Tensor, sin: Tensor) -> Tensor:
        """As `fused.rotate_and_store`, which writes rows with head norms of their own once more."""
        place = self.context.place(self.index)
        # Rows of adapters come scaled.
        own_norms = [(rows, norm, qkv.values.index_select(0, rows)) for rows, norm in self._own_head_norms()]
        query = fused.rotate_and_store(qkv.values, cos, sin, place, self.head_norm, qkv.scales)
        for rows, norm, own_qkv in own_norms:
            own_cos, own_sin, pages, offsets = (
                table.index_select(0, rows) for table in (cos, sin, place.row_pages, place.row_offsets)
            )
            own_place = KVPlace(place.keys, place.values, pages, offsets)
            query.index_copy_(0, rows, fused.rotate_and_store(own_qkv, own_cos, own_sin, own_place, norm))
        return query

    def _own_head_norms(self) -> Iterator[tuple[Tensor, HeadNorm]]:
        """Rows of the running pass whose adapter replaces a norm of queries or keys, and what norms them."""
        base = self.head_norm
        if base is None:
            return
        query_norm, key_norm = self.self_attn.q_norm, self.self_attn.k_norm
        if not isinstance(query_norm, AdapterNorm) or not isinstance(key_norm, AdapterNorm):
            return
        for owner in query_norm.context.owners(query_norm.context.segments):
            query, key = query_norm.parameters_of(owner), key_norm.parameters_of(owner)
            if query or key:
                norm = HeadNorm(query.get("weight", base.query_weight), key.get("weight", base.key_weight), base.eps)
                yield owner.rows, norm


class FusedBody(nn.Module):
    """The model between token ids and the head; it takes the place of transformers' own body, under its names."""

    def __init__(self, body: Any, layers: list[FusedLayer]) -> None:
        super().__init__()
        self.config = body.config
        self.embed_tokens = body.embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = body.norm
        self.rotary_emb = body.rotary_emb

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: object) -> BaseModelOutputWithPast:
        """input_ids, position_ids: (1, rows); the rest of what transformers' heads pass on is not used."""
        embedded: Tensor = self.embed_tokens(input_ids)[0]
        cos, sin = (table[0] for table in self.rotary_emb(embedded[None], position_ids))
        x, residual = Output(embedded), None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin)
        return BaseModelOutputWithPast(last_hidden_state=_norm(self.norm, x, residual).values[None])


def substitute(model: PreTrainedModel, context: AttentionContext) -> str | None:
    """Let fused layers compute `model`, whose projections have been substituted already.

    Returns None when that is done, and otherwise why it is not: the model is left as it was.
    """
    body: Any = model.base_model
    kind = f"{type(body).__module__}.{type(body).__name__}".removeprefix("transformers.models.").removesuffix("Model")
    if kind not in _WINDOWS or body is model:
        return f"none are fused for {type(body).__name__}"
    if body.config.hidden_act not in ("silu", "swish"):
        return f"its activation is {body.config.hidden_act}"
    layers = []
    for index, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for part, name in ((attention, "Attention"), (mlp, "MLP")):
            if f"{type(part).__module__}.{type(part).__name__}" != f"transformers.models.{kind}{name}":
                return f"layer {index} has a {type(part).__name__}"
        projections = [
            _fused_of(attention.q_proj, attention.k_proj, attention.v_proj),
            _fused_of(attention.o_proj),
            _fused_of(mlp.gate_proj, mlp.up_proj),
            _fused_of(mlp.down_proj),
        ]
        fused_projections = [projection for projection in projections if projection is not None]
        if len(fused_projections) < len(projections):
            return f"projections of layer {index} are not plain linear ones"
        layers.append(FusedLayer(layer, fused_projections, index, _WINDOWS[kind](attention), context))
    model.set_submodule(model.base_model_prefix, FusedBody(body, layers))
    return None


def tabled_norms(model: PreTrainedModel) -> frozenset[str]:
    """Parameters of norms that adapters may replace in a captured step: those between the products of fused layers.

    Norms of heads are not among them, nor any norm of a model whose layers are not fused.
    """
    body: Any = model.base_model
    if not isinstance(body, FusedBody):
        return frozenset()
    norms = [body.norm]
    for layer in body.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    return frozenset(f"{norm.name}.weight" for norm in norms if isinstance(norm, AdapterNorm))


def _norm(module: nn.Module, x: Output, residual: Tensor | None, reader: FusedProjection | None = None) -> Input:
    """Add x to the residual and norm the sum, also in fp8 if the projection that reads it wants that."""
    weight, eps = module.weight, _untouched(module).variance_epsilon
    assert isinstance(weight, Tensor)
    assert isinstance(eps, float)
    if reader is None or reader.fp8_weight is None:
        y, in_fp8 = fused.rms_norm(x.values, weight, eps, residual, x.scales), None
    else:
        y, in_fp8 = fused.rms_norm_fp8(x.values, weight, eps, residual, x.scales)
    if isinstance(module, AdapterNorm):
        summed = x.values if residual is None else residual
        segments = module.context.segments_at(module.place, module.name, summed.shape[0])
        if summed.is_cuda and module.own_weight is not None and segments is not None:
            if module.context.has_extras:
                from lorafleet.kernels import own_triton

                own_triton.norm_rows(summed, y, module.own_weight, segments, eps)
                in_fp8 = None
            return Input(y, in_fp8)
        for rows, parameters in module.replaced(summed.shape[0]):
            y.index_copy_(0, rows, fused.rms_norm(summed.index_select(0, rows), parameters["weight"], eps))
            in_fp8 = None
    return Input(y, in_fp8)


def _silu_mul(gate_up: Output, reader: FusedProjection) -> Input:
    if reader.fp8_weight is None:
        return Input(fused.silu_mul(gate_up.values, gate_up.scales))
    return Input(*fused.silu_mul_fp8(gate_up.values, gate_up.scales))


def _project(projection: FusedProjection, x: Input) -> Output:
    return Output(*projection.unscaled(x.values, x.in_fp8))


def _untouched(norm: nn.Module) -> Any:
    """Transformers' own norm."""
    return norm.base if isinstance(norm, AdapterNorm) else norm


def _fused_of(*members: nn.Module) -> FusedProjection | None:
    """The product of these modules, if they are all the members of one group, in order."""
    fused_of = {id(member.fused) for member in members if isinstance(member, ProjectionSlice)}
    first = members[0]
    if len(fused_of) != 1 or not isinstance(first, ProjectionSlice) or len(first.fused.widths) != len(members):
        return None
    indices = [member.index for member in members if isinstance(member, ProjectionSlice)]
    return first.fused if indices == list(range(len(members))) else None
