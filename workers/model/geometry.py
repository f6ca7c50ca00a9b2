"""Finds the modules of a base that an adapter may target, their shapes, and those that share an input.

Read from the configuration alone (meta tensors), so the adapter store can validate without loading the base.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafleet.adapter_store.manifest import BaseGeometry, Dtype, ModuleShape
from lorafleet.workers.checkpoint import read_config
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.model.experts import expert_shapes, is_dense_experts, is_experts, is_router
from lorafleet.workers.model.family_attention import is_linear
from lorafleet.workers.model.text_part import whole_names

TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules of one parent that are always applied to the same tensor, one after another; they are fused."""

NORMS = "norms"
"""A kind of what adapters change, beside those of `kind_of`."""


def resolve_device(device: str) -> torch.device:
    """`auto` takes a GPU if there is one, `cuda` the first. Raises WorkerConfigError for a device that is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    num_gpus = torch.cuda.device_count() if resolved.type == "cuda" else 0
    if resolved.type != "cpu" and (resolved.index or 0) >= num_gpus:
        raise WorkerConfigError(f"worker.device: there is no {device!r} here; {num_gpus} GPUs can be seen")
    # With its number: what a thread is to make its current device must have one.
    return torch.device("cuda", resolved.index or 0) if resolved.type == "cuda" else resolved


def resolve_dtype(model: ModelConfig, config: PretrainedConfig, device: torch.device) -> Dtype:
    """`auto` takes float32 on a CPU, the checkpoint's dtype elsewhere (bfloat16 where that is float32 or unset)."""
    if model.dtype != "auto":
        return model.dtype
    if device.type == "cpu":
        return "float32"
    return "float16" if getattr(config, "dtype", None) == torch.float16 else "bfloat16"


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base without weights, on the meta device."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UnsupportedModel(
            f"transformers has no model of causal language for {config.model_type}, or not for this configuration"
        ) from error
    except ImportError as error:
        raise UnsupportedModel(f"{config.model_type} needs a package that is not installed: {error}") from error


def read_geometry(model: ModelConfig, device: str = "auto") -> BaseGeometry:
    """The modules of the base at `model.source` that an adapter may target."""
    config = read_config(model)
    dtype = resolve_dtype(model, config, resolve_device(device))
    geometry = geometry_of(empty_model(config, TORCH_DTYPES[dtype]), dtype)
    names, others = whole_names(AutoConfig.from_pretrained(model.source))
    for name, shape in geometry.modules.items():
        owner, _, leaf = name.rpartition(".")
        if shape.kind == "experts" and owner in names:
            names[name] = f"{names[owner]}.{leaf}"
    return replace(geometry, whole_names=names, left_out=others)


def kind_of(name: str, shape: ModuleShape) -> str:
    """The last part of a module's name; experts have one kind for their parameters together."""
    return (name.rpartition(".")[0] if shape.kind == "experts" else name).rpartition(".")[2]


def without(geometry: BaseGeometry, kinds: Collection[str]) -> BaseGeometry:
    """The geometry without modules of these kinds; `NORMS` stands for the parameters of all norms."""
    if not kinds:
        return geometry
    modules = {name: shape for name, shape in geometry.modules.items() if kind_of(name, shape) not in kinds}
    return replace(
        geometry,
        modules=modules,
        vectors={} if NORMS in kinds else geometry.vectors,
    )


def geometry_of(model: PreTrainedModel, dtype: Dtype) -> BaseGeometry:
    """Return the linear modules and the embedding that an adapter may target, and the norms that it may replace."""
    modules: dict[str, ModuleShape] = {}
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        # Subclasses may compute something else (a quantised linear): only the plain types count, and scaled embeddings.
        if type(module) is nn.Linear or is_linear(module):
            modules[name] = ModuleShape("linear", module.in_features, module.out_features)
        elif type(module) is Conv1D:
            modules[name] = ModuleShape("linear", module.nx, module.nf)
        elif module is embedding and _is_plain_or_scaled(module):
            modules[name] = ModuleShape("embedding", module.num_embeddings, module.embedding_dim)
        elif is_experts(module) or is_dense_experts(module):
            modules |= expert_shapes(name, module)
        elif is_router(module, model.get_submodule(name.rpartition(".")[0])):
            num_experts, hidden = module.get_parameter("weight").shape
            modules[name] = ModuleShape("router", hidden, num_experts)
    return BaseGeometry(
        modules=modules,
        dtype=dtype,
        vectors=_norm_parameters(model),
        tied=_tied(model),
        parameters=frozenset(
            (*(name for name, _ in model.named_parameters(remove_duplicate=False)), *model.state_dict())
        ),
        kinds=(type(model).__name__, model.config.model_type),
    )


def _is_plain_or_scaled(embedding: nn.Embedding) -> bool:
    """Return True for an embedding, also one times `embed_scale`, which PEFT knows."""
    scale = getattr(embedding, "embed_scale", None)
    is_scaled = isinstance(scale, float) or (isinstance(scale, torch.Tensor) and scale.numel() == 1)
    return type(embedding) is nn.Embedding or (isinstance(embedding, nn.Embedding) and is_scaled)


def _norm_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Width of each parameter of the norms that can be computed with another one for some rows.

    Those are norms of the hidden state, and Qwen3's norms of heads, which come after rows: others may come before.
    """
    hidden = getattr(model.config, "hidden_size", None)
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        # What is called with more than the row itself may need more of the row.
        if "Norm" not in kind or len(inspect.signature(module.forward).parameters) != 1:
            continue
        parameters = dict(module.named_parameters())
        is_of_rows = all(kind == "Qwen3RMSNorm" or value.shape == (hidden,) for value in parameters.values())
        is_served_dtype = all(value.dtype == model.dtype for value in parameters.values())
        if parameters.keys() <= {"weight", "bias"} and is_of_rows and is_served_dtype:
            found |= {f"{name}.{parameter}": value.numel() for parameter, value in parameters.items()}
    return found


def _tied(model: PreTrainedModel) -> dict[str, str]:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or output.weight is not embedding.weight:
        return {}
    name_of = {module: name for name, module in model.named_modules()}
    return {name_of[output]: name_of[embedding]}


def projection_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Partition module names into groups that share their input, in the order of the model."""
    names = list(names)
    present = set(names)
    leader: dict[str, tuple[str, ...]] = {}
    follower: set[str] = set()
    for name in names:
        parent, _, last = name.rpartition(".")
        for family in SHARED_INPUT:
            group = tuple(f"{parent}.{member}" for member in family)
            if last == family[0] and present.issuperset(group):
                leader[name] = group
                follower.update(group[1:])
    return [leader.get(name, (name,)) for name in names if name not in follower]
