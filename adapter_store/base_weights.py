"""The base's own weights, read from its checkpoint.

PEFT stores a base's embedding matrices beside an adapter that targets them. They are compared with the base's own:
equal ones are dropped, others are refused. Trained biases and tokens are kept as differences from the base's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from lorafleet.adapter_store.errors import SourceUnavailable
from lorafleet.adapter_store.manifest import BaseGeometry
from lorafleet.adapter_store.renaming import renamed
from lorafleet.adapter_store.tensor_file import TensorFile, tag_of
from lorafleet.adapter_store.tensors import Tensor

_WEIGHTS = "model.safetensors"


class BaseWeights(Protocol):
    """Reads weights of the base."""

    def read(self, module: str, leaf: str, rows: Sequence[int] | None = None) -> Tensor | None:
        """`read("lm_head", "weight")`, or None if the base stores no such weight, or in fewer bits than floats have.

        With `rows` only these of its rows, in this order. Raises SourceUnavailable when the base's checkpoint cannot be
        reached now.
        """


class CheckpointWeights:
    """`BaseWeights` of a safetensors checkpoint: a local folder, or a hub id, of which it takes the files it needs."""

    def __init__(self, source: str | Path) -> None:
        self._source = source

    def read(self, module: str, leaf: str, rows: Sequence[int] | None = None) -> Tensor | None:
        name = f"{module}.{leaf}"
        if name not in self._file_of:
            # Checkpoints of a bare decoder lack the first parts: `wte.weight` is `transformer.wte.weight`.
            ends = [stored for stored in self._file_of if name.endswith(f".{stored}")]
            ends = [self._renamed[name]] if name in self._renamed else ends
            if len(ends) != 1:
                return None
            (name,) = ends
        path = self._path(self._file_of[name])
        if path is None:
            return None
        file = TensorFile.open(path)
        return file.read(name, rows) if tag_of(file.entries[name]) is not None else None

    @cached_property
    def _file_of(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self._path(f"{_WEIGHTS}.index.json")
        if index is not None:
            return dict(json.loads(index.read_bytes())["weight_map"])
        single = self._path(_WEIGHTS)
        if single is not None:
            return dict.fromkeys(TensorFile.open(single).entries, _WEIGHTS)
        if Path(self._source).is_dir():
            return {}
        raise SourceUnavailable("source_unavailable", "the base's checkpoint cannot be reached to compare with")

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Names that transformers gives on load -> those of the file: GPT-NeoX's `embed_out` becomes `lm_head`."""
        path = self._path("config.json")
        fields = json.loads(path.read_bytes()) if path is not None else {}
        kinds = (*(fields.get("architectures") or ()), fields.get("model_type") or "")
        return {renamed(kinds, stored): stored for stored in self._file_of}

    def _path(self, file_name: str) -> Path | None:
        if Path(self._source).is_dir():
            path = Path(self._source) / file_name
            return path if path.is_file() else None
        try:
            return Path(huggingface_hub.hf_hub_download(str(self._source), file_name))
        except (LocalEntryNotFoundError, EntryNotFoundError, HFValidationError):
            return None
        except OSError as error:
            message = "the base's checkpoint cannot be reached to compare with"
            raise SourceUnavailable("source_unavailable", message) from error


def own_weight(
    base: BaseWeights | None, geometry: BaseGeometry, module: str, leaf: str, rows: Sequence[int] | None = None
) -> Tensor | None:
    """The base's own weight of a module, or None if it is not at hand; an output may use the embedding's matrix."""
    if base is None:
        return None
    own = base.read(module, leaf, rows)
    if own is None and leaf == "weight" and module in geometry.tied:
        own = base.read(geometry.tied[module], leaf, rows)
    return own
