"""Parts of a layer that fused kernels compute: norms, and attention up to its output, told by what they do.

A module whose children have a known shape runs on random input, with stand-ins for its projections. Where the kernels'
arithmetic gives the same numbers, it is a part; any other module stays transformers'. Weights stay where they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafleet.kernels import fp8, fused
from lorafleet.kernels.fp8_values import Fp8Rows
from lorafleet.kernels.kv_place import HeadNorm, KVPlace, Rotation
from lorafleet.kernels.norms import Norm, NormRule
from lorafleet.kernels.scores import Scores
from lorafleet.workers.model.attention_calls import AttentionCall
from lorafleet.workers.model.lora_layers import FusedProjection, ProjectionSlice
from lorafleet.workers.model.norm_layers import AdapterNorm
from lorafleet.workers.model.paged_attention import AttentionContext, attend
from lorafleet.workers.model.stand_ins import CANNOT, Attended, Call, StandIn, attention_recorded, copied, is_near
from lorafleet.workers.model.wiring import is_norm, untouched

NUM_ROWS = 4
"""Of random input that a module is tried with."""
LARGE = 30.0
"""Size of elements that leave whatever limits a module sets them."""
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
ANGLES = "position_embeddings"
"""What transformers calls cos and sin in a call of attention."""


class Output(NamedTuple):
    """Output of a projection, (rows, width), and (rows,) what it is still to be multiplied with."""

    values: Tensor
    scales: Tensor | None = None

    def finished(self) -> Tensor:
        """(rows, width): multiplied with the scales, in place."""
        return self.values if self.scales is None else fp8.rescale(self.values, self.scales)


class Input(NamedTuple):
    """Input of a projection, (rows, width), also in fp8 if that was made with it."""

    values: Tensor
    in_fp8: Fp8Rows | None = None


def project(projection: FusedProjection, x: Input) -> Output:
    """Compute a projection and its LoRA."""
    return Output(*projection.unscaled(x.values, x.in_fp8))


# --- norms ---


def rule_of(norm: nn.Module, rules: dict[tuple[object, ...], NormRule | None]) -> NormRule | None:
    """The rule of transformers' own norm, whatever its weight; None for another kind. `rules` keeps what was found."""
    if len(inspect.signature(norm.forward).parameters) != 1:
        return None  # it may be called with a gate
    parameters = dict(norm.named_parameters())
    eps = next((getattr(norm, name) for name in _EPS_NAMES if isinstance(getattr(norm, name, None), float)), None)
    if parameters.keys() != {"weight"} or parameters["weight"].dim() != 1 or eps is None:
        return None
    width = parameters["weight"].shape[0]
    key = (type(norm), eps, width)
    if key not in rules:
        rules[key] = _tried(norm, eps, width)
    return rules[key]


def _tried(norm: nn.Module, eps: float, width: int) -> NormRule | None:
    own = copied(norm, {}, torch.float32)
    x = torch.randn(NUM_ROWS, width) + 0.5
    x[0] *= eps**0.5  # so small that eps counts
    weight = torch.randn(width)
    for offset, is_centred in ((0.0, False), (1.0, False), (0.0, True)):
        rule = NormRule(eps, offset, True, is_centred)
        if is_near(fused.rms_norm(x, Norm(weight, rule)), _own_norm(own, weight, x)):
            x, weight = x.bfloat16(), weight.bfloat16()
            rounded = NormRule(eps, offset, False, is_centred)
            wanted = _own_norm(own, weight, x)
            differ = [(fused.rms_norm(x, Norm(weight, each)) != wanted).sum() for each in (rule, rounded)]
            return rule if differ[0] <= differ[1] else rounded
    return None


def _own_norm(own: Any, weight: Tensor, x: Tensor) -> Tensor:
    own._parameters["weight"] = weight
    try:
        made: Tensor = own(x)
    except CANNOT:
        made = torch.empty(0)
    return made if isinstance(made, Tensor) else torch.empty(0)


def own_rows(norm: nn.Module, num_rows: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Rows of the running pass whose adapter replaces a parameter of the norm, as `AdapterNorm.replaced`."""
    return norm.replaced(num_rows) if isinstance(norm, AdapterNorm) else []


class FusedNorm:
    """Stands for the forward of transformers' own norm, in one launch."""

    def __init__(self, norm: nn.Module, rule: NormRule) -> None:
        self._norm, self._rule, self._own = norm, rule, norm.forward

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., width) -> the same shape. The weight may be another's for the call."""
        weight = self._norm.weight
        if not isinstance(weight, Tensor) or weight.dtype != x.dtype or x.stride(-1) != 1:
            y: Tensor = self._own(x)
            return y
        return fused.rms_norm(x.reshape(-1, x.shape[-1]), Norm(weight, self._rule)).view(x.shape)


# --- attention ---


class FusedAttention:
    """Attention between its projections: norms of queries and keys, rotation, the write to pages, and the scores."""

    def __init__(
        self,
        qkv: FusedProjection,
        out: FusedProjection,
        call: AttentionCall,
        layer: int,
        context: AttentionContext,
        scores: Scores,
        rotation: Rotation,
        norms: tuple[nn.Module, nn.Module] | None,
        rule: NormRule | None,
    ) -> None:
        """`norms`: of queries and of keys, over each head or over all; of one rule."""
        self.reader, self._out = qkv, out
        self._layer, self._context, self._scores = layer, context, scores
        self.rotation = rotation
        self._norms, self._rule = norms, rule
        widths = call.num_heads * call.head_dim, call.num_kv_heads * call.head_dim
        self._spans = ((0, widths[0]), (widths[0], sum(widths)))
        """Columns of the queries and of the keys."""
        self._is_whole = norms is not None and _width(norms[0]) != call.head_dim
        self._head_norm: HeadNorm | None = None
        if norms is not None and rule is not None and not self._is_whole:
            self._head_norm = HeadNorm(*(Norm(untouched(norm).get_parameter("weight"), rule) for norm in norms))

    def __call__(self, x: Input, angles: tuple[Tensor, Tensor] | None) -> Output:
        """x: (rows, width) -> (rows, width). angles: cos and sin, (rows, ...); None where nothing is rotated."""
        qkv = project(self.reader, x)
        query = self.rotated(qkv, angles)
        attended = attend(query, self._context, self._layer, self._scores)
        return project(self._out, Input(attended.flatten(1)))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        """Stands for the module's forward: (1, rows, width) -> the same shape."""
        y = self(Input(hidden_states[0]), self.angles(arguments.get(ANGLES))).finished()
        return y[None], None

    def angles(self, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Cos and sin as `__call__` takes them, from those of (1, rows, ...) that the module is given."""
        if not self.rotation.width or given is None:
            return None
        # Some rotary embeddings give columns that are neighbours in memory, and the kernels read rows.
        return given[0][0].contiguous(), given[1][0].contiguous()

    def rotated(self, qkv: Output, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """As `fused.rotate_and_store`, which writes rows with head norms of their own once more."""
        place = self._context.place(self._layer)
        if self._is_whole:
            qkv = Output(qkv.finished())
            self._norm_whole(qkv.values)
        # Rows of adapters come scaled.
        own_norms = [(rows, norm, qkv.values.index_select(0, rows)) for rows, norm in self._own_head_norms()]
        query = fused.rotate_and_store(qkv.values, angles, place, self.rotation, self._head_norm, qkv.scales)
        for rows, norm, own_qkv in own_norms:
            own_angles = None if angles is None else tuple(table.index_select(0, rows) for table in angles)
            pages, offsets = (table.index_select(0, rows) for table in (place.row_pages, place.row_offsets))
            own_place = replace(place, row_pages=pages, row_offsets=offsets)
            own_query = fused.rotate_and_store(own_qkv, own_angles, own_place, self.rotation, norm)  # type: ignore[arg-type]
            query.index_copy_(0, rows, own_query)
        return query

    def _norm_whole(self, qkv: Tensor) -> None:
        assert self._norms is not None
        assert self._rule is not None
        for norm, (first, end) in zip(self._norms, self._spans, strict=True):
            columns = qkv[:, first:end]
            own = [
                (rows, fused.rms_norm(columns.index_select(0, rows), Norm(parameters["weight"], self._rule)))
                for rows, parameters in own_rows(norm, qkv.shape[0])
            ]
            fused.rms_norm(columns, Norm(untouched(norm).get_parameter("weight"), self._rule), out=columns)
            for rows, values in own:
                columns.index_copy_(0, rows, values)

    def _own_head_norms(self) -> Iterator[tuple[Tensor, HeadNorm]]:
        """Rows of the running pass whose adapter replaces a norm of queries or keys, and what norms them."""
        base = self._head_norm
        if base is None or self._norms is None:
            return
        query_norm, key_norm = self._norms
        if not isinstance(query_norm, AdapterNorm) or not isinstance(key_norm, AdapterNorm):
            return
        for owner in query_norm.context.owners(query_norm.context.segments):
            query, key = query_norm.parameters_of(owner), key_norm.parameters_of(owner)
            if query or key:
                weights = query.get("weight", base.query.weight), key.get("weight", base.key.weight)
                yield owner.rows, HeadNorm(*(Norm(weight, base.query.rule) for weight in weights))


def attention_of(
    module: nn.Module,
    arguments: Mapping[str, Any],
    call: AttentionCall,
    context: AttentionContext,
    rules: dict[tuple[object, ...], NormRule | None],
) -> FusedAttention | None:
    """The part that the module is. `arguments`: of a call beside the hidden state, on the host."""
    found = _attention_projections(module, call)
    layer = module.layer_idx
    if found is None or not isinstance(layer, int) or not all(_is_plain(value) for value in arguments.values()):
        return None
    qkv, out = found
    named = {name: child for name, child in module.named_children() if is_norm(child)}
    names = sorted(named, key=lambda name: name[0] != "q")
    if [name[0] for name in names] not in ([], ["q", "k"]):
        return None
    norms = (named[names[0]], named[names[1]]) if names else None
    rule = rule_of(untouched(norms[0]), rules) if norms else None
    if norms and (rule is None or rule != rule_of(untouched(norms[1]), rules) or not _fit(norms, call)):
        return None
    angles = arguments.get(ANGLES)
    if angles is not None and not _are_angles(angles):
        return None
    arguments = {name: _in_float(value) for name, value in arguments.items()}
    angles = arguments.get(ANGLES)
    num_rows = NUM_ROWS if angles is None else angles[0].shape[1]
    width = (call.num_heads + 2 * call.num_kv_heads) * call.head_dim
    hidden, made, gives = (torch.randn(1, num_rows, size) for size in (8, width, 8))
    made *= LARGE
    calls: list[Call] = []
    children = projections_standing(module, {id(qkv): made, id(out): gives}, calls)
    for name, norm in named.items():
        children[name] = copied(untouched(norm), {}, torch.float32)
    own = copied(module, children, torch.float32)
    with attention_recorded() as seen:
        try:
            result = own(hidden_states=hidden, **arguments)
        except CANNOT:
            return None
    num_projections = len(children) - len(named)
    if len(seen) != 1 or not isinstance(result, tuple) or result[0] is not gives:
        return None
    attended = seen[0]
    if not is_between(calls, hidden, gives, num_projections):
        return None
    if not torch.equal(calls[-1].given[0], attended.gave[0].flatten(1)):
        return None
    scores = _scores(attended, own, module, call)
    if scores is None:
        return None
    for rotation in _rotations(angles, call.head_dim):
        place = _small_place(num_rows, call)
        context_of_place = _OnePlace(place)
        part = FusedAttention(qkv, out, call, layer, context, scores, rotation, norms, rule)
        trial = FusedAttention(qkv, out, call, layer, context_of_place, scores, rotation, _on_host(norms), rule)  # type: ignore[arg-type]
        query = trial.rotated(Output(made[0].clone()), trial.angles(angles))
        pairs = ((query, attended.query), (place.keys[:, :, 0], attended.key), (place.values[:, :, 0], attended.value))
        if all(is_near(ours, theirs[0].transpose(0, 1)) for ours, theirs in pairs):
            return part
    return None


class _OnePlace:
    """Stands for the attention context of a trial."""

    def __init__(self, place: KVPlace) -> None:
        self._place = place

    def place(self, layer: int) -> KVPlace:
        return self._place


def _attention_projections(module: nn.Module, call: AttentionCall) -> tuple[FusedProjection, FusedProjection] | None:
    """The projections before and behind attention."""
    groups = groups_of(module)
    if groups is None or len(groups) != 2 or call.value_dim != call.head_dim:
        return None
    query, key = call.num_heads * call.head_dim, call.num_kv_heads * call.head_dim
    for qkv, out in (groups, groups[::-1]):
        is_joined = qkv.widths in ([query, key, key], [query + 2 * key])
        if is_joined and len(out.widths) == 1 and out.weight.shape[1] == query:
            return qkv, out
    return None


def _scores(attended: Attended, own: Any, module: nn.Module, call: AttentionCall) -> Scores | None:
    """The rules for attention's scores; None: the module's sinks are not a parameter of it."""
    features = attended.features
    scaling, sinks = features.get("scaling"), features.get("s_aux")
    if sinks is not None:
        name = next((name for name, value in own._parameters.items() if value is sinks), None)
        if name is None:
            return None
        sinks = module.get_parameter(name)
    scaling = call.head_dim**-0.5 if scaling is None else scaling
    if not isinstance(scaling, float):
        return None
    return Scores(scaling, call.window, features.get("softcap"), sinks, features.get("key_bias"))


def _rotations(angles: tuple[Tensor, Tensor] | None, head_dim: int) -> Iterator[Rotation]:
    if angles is not None:
        entries = angles[0].shape[-1]
        for width, is_interleaved, step in (
            (entries, False, 1),
            (entries, True, 1),
            (entries, True, 2),
            (2 * entries, False, 1),
            (2 * entries, True, 1),
        ):
            if 0 < width <= head_dim and width % 2 == 0:
                yield Rotation(width, is_interleaved, step)
    yield Rotation(0)


def _small_place(num_rows: int, call: AttentionCall) -> KVPlace:
    keys, values = torch.zeros(2, num_rows, call.num_kv_heads, 1, call.head_dim)
    rows = torch.arange(num_rows, dtype=torch.int32)
    return KVPlace(keys, values, rows, torch.zeros_like(rows))


def _on_host(norms: tuple[nn.Module, nn.Module] | None) -> tuple[nn.Module, nn.Module] | None:
    if norms is None:
        return None
    made = [nn.Module(), nn.Module()]
    for norm, own in zip(made, norms, strict=True):
        weight = untouched(own).get_parameter("weight").detach().cpu().float()
        norm.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return made[0], made[1]


def _fit(norms: tuple[nn.Module, nn.Module], call: AttentionCall) -> bool:
    widths = (_width(norms[0]), _width(norms[1]))
    whole = (call.num_heads * call.head_dim, call.num_kv_heads * call.head_dim)
    return widths in (whole, (call.head_dim, call.head_dim))


def _width(norm: nn.Module) -> int:
    return untouched(norm).get_parameter("weight").shape[0]


def _is_plain(value: object) -> bool:
    """Return True for what a module can only read."""
    if isinstance(value, tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _are_angles(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(each, Tensor) and each.dim() == 3 and each.shape[0] == 1 for each in value)
    )


def _in_float(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_in_float(each) for each in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- projections ---


def is_between(calls: list[Call], x: Tensor, gives: Tensor, num_projections: int) -> bool:
    """Return True if all projections but the last were given x itself, and each was called once."""
    return (
        len(calls) == num_projections
        and calls[-1].gave is gives
        and all(torch.equal(call.given, x) for call in calls[:-1])
    )


def groups_of(module: nn.Module) -> list[FusedProjection] | None:
    """The products of a module's projections; None if some are computed with others' or not by us."""
    slices = [child for child in module.children() if isinstance(child, ProjectionSlice)]
    if any(
        not isinstance(child, ProjectionSlice) and not is_norm(child) and any(True for _ in child.parameters())
        for child in module.children()
    ):
        return None
    groups = list({id(child.fused): child.fused for child in slices}.values())
    counts = {id(group): sum(child.fused is group for child in slices) for group in groups}
    return groups if all(counts[id(group)] == len(group.widths) for group in groups) else None


def projections_standing(module: nn.Module, gives: Mapping[int, Tensor], calls: list[Call]) -> dict[str, nn.Module]:
    """Stand-ins for the module's projections: each gives its columns of what its group gives."""
    made: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, ProjectionSlice):
            group, whole = child.fused, gives[id(child.fused)]
            part = whole if len(group.widths) == 1 else torch.split(whole, group.widths, dim=-1)[child.index]
            made[name] = StandIn(child, name, calls, part)
    return made
