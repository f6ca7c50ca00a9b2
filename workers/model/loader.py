"""Loads a base model as transformers has it, onto the device, ready for substitution."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from lorafleet.adapter_store.manifest import BaseGeometry, Dtype
from lorafleet.workers.checkpoint import max_model_len, read_config
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.memory.kv_cache import LayerKV
from lorafleet.workers.memory.shares import Share
from lorafleet.workers.memory.state_store import StateShape
from lorafleet.workers.model import text_part
from lorafleet.workers.model.attention_calls import AttentionCall, read_calls
from lorafleet.workers.model.geometry import TORCH_DTYPES, empty_model, geometry_of, resolve_dtype
from lorafleet.workers.model.part_loader import load_part, read_generation_config
from lorafleet.workers.model.quantisation import (
    has_fp8,
    keep_scales,
    pack_weights,
    refuse_device,
    round_weights,
    rounding_inputs,
    why_not_multiplied,
)
from lorafleet.workers.model.recurrent_layers import is_recurrent, read_states
from lorafleet.workers.model.rope import fix_frequencies
from lorafleet.workers.model.sharding import computing_together, shares_of
from lorafleet.workers.model.stored_weights import QuantisedWeight, StoredWeights, name_in
from lorafleet.workers.ranks import Ranks
from lorafleet.workers.weight_format import quantisation_of

logger = logging.getLogger(__name__)

PROBE_TOKENS = 12
"""Length of the prompt that the substituted model must answer as the untouched one does."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model in memory, not yet substituted."""

    model: PreTrainedModel
    geometry: BaseGeometry
    dtype: Dtype
    device: torch.device
    vocab_size: int
    max_model_len: int
    stop_token_ids: frozenset[int]
    """Tokens that end an answer."""
    calls: Mapping[int, AttentionCall]
    """How each layer that attends calls attention."""
    states: Mapping[str, StateShape]
    """What each operation of layers that do not attend keeps of a sequence."""
    probe_token_ids: torch.Tensor
    """(PROBE_TOKENS,) int64: a fixed prompt."""
    probe_logits: torch.Tensor
    """(PROBE_TOKENS, vocab) float32: the untouched model's answer to it."""
    rounded_probe_logits: torch.Tensor | None = None
    """(PROBE_TOKENS, vocab): the same of a model that sees activations in fp8, where the substituted one will."""

    shares: Mapping[str, Share] = field(default_factory=dict)
    """What this rank has of modules that are cut. `geometry` is that of the whole base."""

    @property
    def multiplies_fp8(self) -> bool:
        """True if the body's products are of fp8 rows and weights."""
        return self.rounded_probe_logits is not None

    @property
    def layers(self) -> tuple[LayerKV, ...]:
        """Kept on pages of each layer; heads of zeros for layers that do not attend."""
        calls = (self.calls.get(layer) for layer in range(max(self.calls, default=-1) + 1))
        return tuple(LayerKV(0, 0) if call is None else call.kept for call in calls)

    @property
    def has_latents(self) -> bool:
        """True if pages keep latents in the place of some layers' keys and values."""
        return any(call.latent is not None for call in self.calls.values())


def load_base(
    model: ModelConfig, device: torch.device, ranks: Ranks | None = None, *, compresses: bool = False
) -> BaseModel:
    """Load the base at `model.source`, or this rank's part of it. `compresses`: as in `read_calls`, for a whole base.

    Raises UnsupportedModel, naming what cannot be served.
    """
    config = read_config(model)
    dtype = resolve_dtype(model, config, device)
    rounds = model.quantization == "fp8"
    if rounds:
        refuse_device(device, dtype)
    if ranks is not None and ranks.size > 1:
        return _load_part(model, config, dtype, device, ranks)
    with device:
        if model.load == "dummy":
            loaded = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[dtype])
        elif quantisation_of(config) is None:
            loaded = _load_weights(model.source, config, TORCH_DTYPES[dtype], device)
        else:
            loaded = _load_quantised(model.source, config, TORCH_DTYPES[dtype], device)
    if rounds:
        round_weights(loaded, geometry_of(empty_model(config, TORCH_DTYPES[dtype]), dtype))
    base = base_of(loaded, config, dtype, max_model_len(model, config), compresses=compresses)
    if device.type == "cuda" and has_fp8(loaded, base.geometry):
        reason = why_not_multiplied(device, dtype)
        if reason is not None:
            logger.info("%s serves its fp8 weights dequantised: their product %s", type(loaded).__name__, reason)
            return base
        with torch.inference_mode(), rounding_inputs(loaded, base.geometry):
            rounded = loaded(input_ids=base.probe_token_ids[None], use_cache=False).logits[0]
        base = dataclasses.replace(base, rounded_probe_logits=rounded)
        pack_weights(loaded, base.geometry)
        torch.cuda.empty_cache()
    return base


def _load_part(
    model: ModelConfig, config: PretrainedConfig, dtype: Dtype, device: torch.device, ranks: Ranks
) -> BaseModel:
    """One rank's part of the base, probed together with the others."""
    if model.quantization != "none":
        raise WorkerConfigError(
            f"model.quantization: {model.quantization} is not supported with {ranks.size} ranks: use quantization: none"
        )
    empty = empty_model(config, TORCH_DTYPES[dtype])
    if is_recurrent(empty):
        raise UnsupportedModel(
            f"{type(empty).__name__} has layers that keep a recurrent state, which cannot be cut for "
            f"{ranks.size} ranks: set worker.tensor_parallel_size to 1"
        )
    geometry = geometry_of(empty, dtype)
    shares = shares_of(empty, geometry, ranks)
    part = load_part(model, config, TORCH_DTYPES[dtype], device, shares)
    part.generation_config = read_generation_config(model.source) or part.generation_config
    try:
        with computing_together(part, geometry, shares, ranks):
            base = base_of(part, config, dtype, max_model_len(model, config))
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.info("%s cannot be computed by ranks", type(part).__name__, exc_info=error)
        raise UnsupportedModel(
            f"{type(part).__name__} cannot be cut for {ranks.size} ranks: its layers look at more than their own part"
        ) from error
    return dataclasses.replace(base, shares=shares)


def base_of(
    loaded: PreTrainedModel,
    config: PretrainedConfig,
    dtype: Dtype,
    longest: int,
    probe_tokens: int = PROBE_TOKENS,
    *,
    compresses: bool = False,
) -> BaseModel:
    """The base of a model in memory. Raises UnsupportedModel, naming what cannot be served.

    `longest`: tokens of the longest sequence. `probe_tokens`: length of its probe. `compresses`: as in `read_calls`.
    """
    device = loaded.device
    loaded.eval().requires_grad_(False)
    states = read_states(loaded)
    fix_frequencies(loaded, longest)
    if "logits_to_keep" not in inspect.signature(loaded.forward).parameters:
        raise UnsupportedModel(f"{type(loaded).__name__} cannot give the logits of chosen rows only")
    probe = torch.randint(config.vocab_size, (probe_tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        probe_logits = loaded(input_ids=probe[None], use_cache=False).logits[0].float()
    return BaseModel(
        model=loaded,
        geometry=geometry_of(empty_model(config, TORCH_DTYPES[dtype]), dtype),
        dtype=dtype,
        device=device,
        vocab_size=config.vocab_size,
        max_model_len=longest,
        stop_token_ids=_stop_token_ids(loaded),
        calls=read_calls(loaded, longest, compresses=compresses),
        states=states,
        probe_token_ids=probe,
        probe_logits=probe_logits,
    )


def _load_weights(
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    weights: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """As transformers loads it, from these weights if there are any."""
    cls: Any = AutoModelForCausalLM if weights is None else type(empty_model(config, dtype))
    try:
        loaded, found = cls.from_pretrained(
            source if weights is None else None,
            config=config,
            dtype=dtype,
            key_mapping=dict(text_part.KEYS),
            use_safetensors=True,
            device_map=str(device),
            output_loading_info=True,
            **({} if weights is None else {"state_dict": weights}),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.info("transformers cannot load %s", source, exc_info=error)
        raise UnsupportedModel(f"model.source {source!r} cannot be loaded: {_why_not_loaded(error)}") from error
    if found["missing_keys"]:
        # Transformers would make them up.
        raise UnsupportedModel(f"model.source {source!r} {_what_is_missing(loaded, sorted(found['missing_keys']))}")
    model: PreTrainedModel = loaded
    return model


def _load_quantised(source: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base with dequantised weights. Scales of fp8 weights are kept beside them."""
    stored_weights = StoredWeights(source, config, device)
    plain = copy.deepcopy(config)
    del plain.quantization_config
    loaded = _load_weights(source, plain, dtype, device, dict(stored_weights))
    loaded.generation_config = read_generation_config(source) or loaded.generation_config
    for stored, weight in stored_weights.items():
        if isinstance(weight, QuantisedWeight):
            keep_scales(loaded, name_in(loaded, stored), weight.row_scales)
    return loaded


def _what_is_missing(model: PreTrainedModel, names: list[str]) -> str:
    if len(names) >= sum(1 for _ in model.named_parameters()):
        return f"holds another model than the {type(model).__name__} of its text, which is not loaded from there"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"lacks the weights {', '.join(names[:3])}{more}"


def _why_not_loaded(error: Exception) -> str:
    """In plain words; transformers' own are for the log."""
    if isinstance(error, ImportError):
        return "a package that transformers needs for it is not installed"
    if isinstance(error, SafetensorError):
        return "a weights file is damaged or incomplete"
    if isinstance(error, OSError):
        return "it has no weights in safetensors files, or they cannot be read"
    if "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says"
    return "its weights are not those of its config.json"


def _stop_token_ids(loaded: PreTrainedModel) -> frozenset[int]:
    found: set[int] = set()
    generation: GenerationConfig | None = loaded.generation_config
    for source in (generation, loaded.config):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)
