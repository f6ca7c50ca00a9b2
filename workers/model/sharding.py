"""Cuts a base for its ranks, by transformers' own plan of tensor parallelism.

The plan says by pattern which linear modules are cut by outputs (`colwise`) and which by inputs (`rowwise`). Heads are
never cut; keys' and values' heads are on several ranks where there are fewer of them than ranks. The embedding and the
head are cut by vocabulary. Of a mixture's experts each rank has some, whatever the plan says of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lorafleet.adapter_store.manifest import BaseGeometry, ModuleShape
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.memory.shares import Share, share_of
from lorafleet.workers.model.experts import ARGUMENTS, is_dense_experts, is_experts, projections
from lorafleet.workers.ranks import Ranks

WHOLE = frozenset({"replicated_with_grad_allreduce", "replicated", "replicate", "mla_kv_a_proj"})
"""Names that plans have for modules which every rank holds."""
GATHERED = frozenset({"colwise_gather_output", "rowwise_split_input"})
"""Names of ways to cut modules between which the whole is put together. In mixtures, every rank holds these whole."""
SHARED_HEADS = ("k_proj", "v_proj")
"""Last parts of the names of modules whose heads serve several of the query's."""


def shares_of(model: PreTrainedModel, geometry: BaseGeometry, ranks: Ranks) -> dict[str, Share]:
    """The rank's part of each module that is cut; none for one rank. `model` may be on the meta device.

    Raises UnsupportedModel for a base that cannot be cut, WorkerConfigError for one that so many ranks cannot share.
    """
    if ranks.size == 1:
        return {}
    plan = _plan(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shares: dict[str, Share] = {}
    for name, module in model.named_modules():
        style = next((style for pattern, style in plan.items() if pattern.fullmatch(name)), None)
        is_end = any(module is end for end in ends)
        if is_dense_experts(module):
            raise UnsupportedModel(
                f"{name} of {_kind(model)} has experts that all compute all rows, which cannot be cut for {ranks.size} "
                "ranks: set worker.tensor_parallel_size to 1"
            )
        if is_experts(module):
            for parameter in (f"{name}.{leaf}" for leaf in projections(module)):
                whole = geometry.modules[parameter]
                shares[parameter] = Share.of_experts(whole, *_part(name, "experts", whole.num_experts, ranks))
            continue
        if not is_end and (style is None or style in WHOLE):
            continue
        shape = geometry.modules.get(name)
        if shape is None:
            raise UnsupportedModel(
                f"{name} of {_kind(model)} is a {type(module).__name__}, which cannot be cut for {ranks.size} ranks"
            )
        shares[name] = _cut(name, shape, "vocabulary" if is_end else style, _head_dim(model, name), ranks)
    return shares


def narrow(model: PreTrainedModel, shares: Mapping[str, Share]) -> None:
    """Give the modules that are cut parameters of their part's size, on the meta device, and tie what is tied."""
    for parameter, whole in list(model.named_parameters(remove_duplicate=False)):
        name, _, leaf = parameter.rpartition(".")
        module: Any = model.get_submodule(name)
        share = share_of(parameter, shares)
        if share is None:
            continue
        parts = zip(share.of_parameter(whole.dim()), whole.shape, strict=True)
        sizes = [len(range(*part.indices(size))) for part, size in parts]
        setattr(module, leaf, nn.Parameter(torch.empty(sizes, dtype=whole.dtype, device="meta"), requires_grad=False))
        if share.shape.kind == "experts":
            module.num_experts = share.shape.num_experts
        elif share.shape.kind == "embedding":
            module.num_embeddings = share.shape.in_dim
        else:
            module.in_features, module.out_features = share.shape.in_dim, share.shape.out_dim
    for name, module in model.named_modules():
        query, key = shares.get(f"{name}.q_proj"), shares.get(f"{name}.k_proj")
        if query is not None and key is not None and hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = query.shape.out_dim // key.shape.out_dim
    model.tie_weights()


@contextmanager
def computing_together(
    model: PreTrainedModel, geometry: BaseGeometry, shares: Mapping[str, Share], ranks: Ranks
) -> Iterator[None]:
    """Within it, transformers' own modules compute with those of the other ranks, as one whole model."""
    with ExitStack() as stack:
        for name, share in shares.items():
            if share.shape.kind == "experts":
                owner, _, leaf = name.rpartition(".")
                if leaf == projections(model.get_submodule(owner))[0]:
                    for hook in _expert_hooks(model.get_submodule(owner), share, ranks):
                        stack.callback(hook.remove)
                continue
            module, whole = model.get_submodule(name), geometry.modules[name]
            for hook in _hooks(module, share, whole, module is model.get_output_embeddings(), ranks):
                stack.callback(hook.remove)
        yield


def _plan(model: PreTrainedModel) -> dict[re.Pattern[str], str]:
    """Pattern of a module's name -> how it is cut. Raises UnsupportedModel where that is not done here."""
    written: Mapping[str, str] = getattr(model.config, "base_model_tp_plan", None) or {}
    if not written and not getattr(model.config, "base_model_ep_plan", None):
        raise UnsupportedModel(
            f"transformers has no plan of tensor parallelism for {_kind(model)}: set worker.tensor_parallel_size to 1"
        )
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    plan = {re.compile(re.escape(prefix + name).replace(r"\*", r"\d+")): style for name, style in written.items()}
    # Embedding and head are always cut by tokens, whatever a version of transformers says of them.
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    of_experts = {name for name, module in model.named_modules() if is_experts(module) or is_dense_experts(module)}
    modules = [name for name, module in model.named_modules() if not any(module is end for end in ends)]
    names = [name for name in modules if name not in of_experts]
    names += [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in of_experts]
    for pattern, style in plan.items():
        if of_experts and style in GATHERED:
            plan[pattern] = "replicated"
        if plan[pattern] in ("colwise", "rowwise") or plan[pattern] in WHOLE:
            continue
        found = next((name for name in names if pattern.fullmatch(name)), None)
        if found is not None:
            raise UnsupportedModel(
                f"{_kind(model)} cannot be cut for several ranks: its plan has {style!r} for {found}, which is not "
                "supported; set worker.tensor_parallel_size to 1"
            )
    return plan


def _cut(name: str, shape: ModuleShape, style: str | None, head_dim: int, ranks: Ranks) -> Share:
    if style == "vocabulary" and shape.kind == "embedding":
        return Share.of_inputs(shape, *_part(name, "tokens", shape.in_dim, ranks))
    if style == "rowwise":
        return Share.of_inputs(shape, *_part(name, "inputs", shape.in_dim, ranks))
    if style == "vocabulary" or head_dim == 1:
        return Share.of_outputs(shape, *_part(name, "outputs", shape.out_dim, ranks))
    num_heads = shape.out_dim // head_dim
    if name.endswith(SHARED_HEADS) and ranks.size % num_heads == 0:
        return Share.of_outputs(shape, ranks.rank * num_heads // ranks.size * head_dim, head_dim)
    first, count = _part(name, "heads", num_heads, ranks)
    return Share.of_outputs(shape, first * head_dim, count * head_dim)


def _part(name: str, what: str, size: int, ranks: Ranks) -> tuple[int, int]:
    """The first of this rank's, and how many it has."""
    if size % ranks.size:
        raise WorkerConfigError(
            f"worker.tensor_parallel_size: {ranks.size} ranks cannot share the {size} {what} of {name} evenly: take a "
            f"divisor of {size}"
        )
    count = size // ranks.size
    return ranks.rank * count, count


def _head_dim(model: PreTrainedModel, name: str) -> int:
    """Width of a head, of which a module has several; 1 for one that has none."""
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    if hasattr(owner, "kv_lora_rank"):  # latent attention, where heads of keys and values are made of a latent
        is_of_keys = name.endswith("kv_b_proj")
        return int(owner.qk_nope_head_dim + owner.v_head_dim if is_of_keys else owner.qk_head_dim)
    head_dim = getattr(owner, "head_dim", None)
    return head_dim if isinstance(head_dim, int) else 1


def _hooks(module: nn.Module, share: Share, whole: ModuleShape, is_head: bool, ranks: Ranks) -> list[RemovableHandle]:
    if share.shape.kind == "embedding":
        return _embedding_hooks(module, share, ranks)
    if is_head:
        return [
            module.register_forward_hook(
                lambda _, inputs, y: ranks.gather_columns(y.flatten(0, -2)).view(*y.shape[:-1], whole.out_dim)
            )
        ]
    if share.shape.in_dim == whole.in_dim:
        return []

    def add_up(_: nn.Module, inputs: object, y: Tensor) -> Tensor:
        bias = module.bias
        if not isinstance(bias, Tensor):
            return ranks.all_reduce(y)
        return ranks.all_reduce(y - bias) + bias

    return [module.register_forward_hook(add_up)]


def _embedding_hooks(module: nn.Module, share: Share, ranks: Ranks) -> list[RemovableHandle]:
    elsewhere: list[Tensor] = []

    def look_up_own(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        own = inputs[0] - share.first_input
        elsewhere.append((own < 0) | (own >= share.shape.in_dim))
        return (own.clamp(0, share.shape.in_dim - 1),)

    def add_up(_: nn.Module, inputs: object, y: Tensor) -> Tensor:
        return ranks.all_reduce(y.masked_fill(elsewhere.pop()[..., None], 0.0))

    return [module.register_forward_pre_hook(look_up_own), module.register_forward_hook(add_up)]


def _expert_hooks(experts: nn.Module, share: Share, ranks: Ranks) -> list[RemovableHandle]:
    def choose_own(
        _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rows of others' experts go to one that is here, and count nothing."""
        hidden_states, index, weights = {**dict(zip(ARGUMENTS, inputs, strict=False)), **named}.values()
        own = index - share.first_expert
        is_here = (own >= 0) & (own < share.shape.num_experts)
        return (hidden_states, own.where(is_here, 0), weights.where(is_here, 0)), {}

    return [
        experts.register_forward_pre_hook(choose_own, with_kwargs=True),
        experts.register_forward_hook(lambda _, inputs, y: ranks.all_reduce(y)),
    ]


def _kind(model: PreTrainedModel) -> str:
    kind: str = model.config.model_type
    return kind
