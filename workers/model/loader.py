"""Loads a base model as transformers has it, onto the device, ready for substitution."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from lorafleet.workers.errors import UnsupportedModel
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
from lorafleet.workers.model.recurrent_layers import is_recurrent, read_states, take_plain_functions
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
    ranks = ranks or Ranks()
    geometry = geometry_of(empty_model(config, TORCH_DTYPES[dtype]), dtype)
    shares: Mapping[str, Share] = {}
    if ranks.size == 1:
        loaded = _load_whole(model, config, TORCH_DTYPES[dtype], device)
    else:
        loaded, shares = _load_part(model, config, geometry, device, ranks)
    if device.type == "cpu":
        take_plain_functions(type(loaded))
    if rounds:
        round_weights(loaded, geometry, ranks)
    with _computing_together(loaded, geometry, shares, ranks):
        base = base_of(loaded, config, dtype, max_model_len(model, config), compresses=compresses)
        base = dataclasses.replace(base, shares=shares, rounded_probe_logits=_rounded_logits(base))
    if base.multiplies_fp8:
        pack_weights(loaded, geometry)
        torch.cuda.empty_cache()
    return base


def _load_whole(model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    with device:
        if model.load == "dummy":
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        if quantisation_of(config) is None:
            return _load_weights(model.source, config, dtype, device)
        return _load_quantised(model.source, config, dtype, device)


def _load_part(
    model: ModelConfig, config: PretrainedConfig, geometry: BaseGeometry, device: torch.device, ranks: Ranks
) -> tuple[PreTrainedModel, Mapping[str, Share]]:
    """One rank's part of the base, and what it has of modules that are cut."""
    dtype = TORCH_DTYPES[geometry.dtype]
    empty = empty_model(config, dtype)
    if is_recurrent(empty):
        raise UnsupportedModel(
            f"{type(empty).__name__} has layers that keep a recurrent state, which cannot be cut for "
            f"{ranks.size} ranks: set worker.tensor_parallel_size to 1"
        )
    shares = shares_of(empty, geometry, ranks)
    part = load_part(model, config, dtype, device, shares)
    part.generation_config = read_generation_config(model.source) or part.generation_config
    return part, shares


@contextmanager
def _computing_together(
    model: PreTrainedModel, geometry: BaseGeometry, shares: Mapping[str, Share], ranks: Ranks
) -> Iterator[None]:
    """Within it, the ranks' parts compute as one model. Raises UnsupportedModel where they cannot."""
    try:
        with computing_together(model, geometry, shares, ranks):
            yield
    except (RuntimeError, TypeError, ValueError) as error:
        if ranks.size == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        logger.info("%s cannot be computed by ranks", type(model).__name__, exc_info=error)
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be cut for {ranks.size} ranks: its layers look at more than their own part"
        ) from error


@torch.inference_mode()
def _rounded_logits(base: BaseModel) -> torch.Tensor | None:
    """The probe's logits where linear modules see fp8 rows; None where fp8 is not multiplied."""
    if base.device.type != "cuda" or not has_fp8(base.model, base.geometry):
        return None
    reason = why_not_multiplied(base.device, base.dtype)
    if reason is not None:
        logger.info("%s serves its fp8 weights dequantised: their product %s", type(base.model).__name__, reason)
        return None
    with rounding_inputs(base.model, base.geometry):
        logits: torch.Tensor = base.model(input_ids=base.probe_token_ids[None], use_cache=False).logits[0]
    return logits


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
