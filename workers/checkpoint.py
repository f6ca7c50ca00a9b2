"""Reads the configuration and the tokenizer of a base: what is known of it without its weights, and without torch.

transformers imports torch with its configurations wherever it can. A process that computes nothing spares it by
`without_torch`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import import_utils

from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.weight_format import format_of, quantisation_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MADE_FROM: Mapping[str, str] = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""`model_type` of a text part with multidimensional RoPE -> that of the text model."""


@contextmanager
def without_torch() -> Iterator[None]:
    """Have transformers take torch for not installed in what it imports meanwhile, unless torch has been imported.

    This process cannot load models from then on.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # to Python it is not there
    import_utils.is_torch_available.cache_clear()
    try:
        yield
    finally:
        del sys.modules["torch"]


def read_config(model: ModelConfig) -> PretrainedConfig:
    """The base's configuration. Raises UnsupportedModel for what is not a decoder-only text model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.source)
    except (OSError, ValueError) as error:
        if model.source.startswith(("/", "~", ".")) and not Path(model.source).exists():
            raise UnsupportedModel(f"model.source {model.source!r} is not there: give a folder or a hub id") from error
        raise UnsupportedModel(f"model.source {model.source!r} cannot be loaded by transformers: {error}") from error
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{config.model_type} is an encoder-decoder model; only decoder-only models are served")
    format_of(model.source, config)
    text, quantisation = text_config(config), quantisation_of(config)
    if quantisation is not None:
        text.quantization_config = quantisation
    return text


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text part; a text model's own is returned as it is."""
    if "text_config" not in config.sub_configs:
        return config
    text: PretrainedConfig = config.get_text_config(decoder=True)
    if text is config:
        return config
    twin = MADE_FROM.get(text.model_type)
    if twin is not None:
        from transformers import CONFIG_MAPPING

        cls: Any = CONFIG_MAPPING[twin]
        fields = {name: value for name, value in vars(text).items() if name in cls.__dataclass_fields__}
        for name in ("architectures", "model_type", "transformers_version"):
            fields.pop(name, None)
        rope = {name: value for name, value in text.rope_parameters.items() if not name.startswith("mrope")}
        text = cls(**{**fields, "rope_parameters": rope})
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer; None when the folder has none (benchmarks send token ids). Raises WorkerConfigError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None
    except ImportError as error:
        raise WorkerConfigError(f"the tokenizer of model.source {source!r} lacks a package: {error}") from error
    return tokenizer


def max_model_len(model: ModelConfig, config: PretrainedConfig) -> int:
    """`model.max_model_len`, or the base's own. Raises UnsupportedModel when it is more than the base was made for."""
    if model.max_model_len is None:
        return _positions(config) or 2048
    longest = longest_model_len(config)
    if longest is not None and model.max_model_len > longest:
        raise UnsupportedModel(f"max_model_len={model.max_model_len} is more than the base's {longest} positions")
    return model.max_model_len


def _positions(config: PretrainedConfig) -> int | None:
    """Of MPT by another name; None: its configuration names none."""
    own: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return own


def longest_model_len(config: PretrainedConfig) -> int | None:
    """The most positions that the base is made for; None: it has no bound.

    That is `max_position_embeddings`, or more where the recipe of YaRN or dynamic RoPE stretches it by a factor.
    """
    longest = _positions(config)
    parameters = getattr(config, "rope_parameters", None) or {}
    if longest is None or parameters.get("rope_type") not in ("yarn", "dynamic") or not parameters.get("factor"):
        return longest
    original = parameters.get("original_max_position_embeddings") or longest
    return max(longest, int(original * parameters["factor"]))
