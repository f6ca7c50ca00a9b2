"""What an adapter version is: its identity, what it targets and what it takes, and its weights in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

NAME_GRAMMAR: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""What adapters and sources may be called."""

Dtype = Literal["float32", "float16", "bfloat16"]

NUMPY_DTYPES: Mapping[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""How each dtype lies in a numpy array; numpy has no bfloat16, so its bits travel as uint16."""


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A base-model module that an adapter may target."""

    kind: Literal["linear", "embedding"]
    in_dim: int
    """Input width; the vocabulary for an embedding."""
    out_dim: int


@dataclass(frozen=True, slots=True)
class BaseGeometry:
    """Every module of the base that an adapter may target, by its name in the model."""

    modules: Mapping[str, ModuleShape]
    """`model.layers.0.self_attn.q_proj` -> its shape."""
    dtype: Dtype
    """The dtype that adapters are served in, which is the model's."""
    vectors: Mapping[str, int] = field(default_factory=dict)
    """Parameters of the base's norms, by name (`model.norm.weight`), and their width: an adapter may replace them."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Output that has no matrix of its own -> the embedding whose it uses: `lm_head` -> `model.embed_tokens`."""


@dataclass(frozen=True, slots=True)
class ModuleManifest:
    """One targeted module of an adapter version."""

    name: str
    rank: int
    scaling: float
    """What B @ A is multiplied with: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""


@lru_cache(maxsize=2**16)
def shared_module(name: str, rank: int, scaling: float) -> ModuleManifest:
    """Adapters are alike: sharing equal parts keeps thousands of manifests small, in memory and pickled together."""
    return ModuleManifest(name, rank, scaling)


@dataclass(frozen=True, slots=True)
class ExtraManifest:
    """What an adapter version brings beside low-rank factors: `num_rows` rows of `width` elements.

    `replaced`: a parameter that takes the place of the base's for the adapter's rows, `name` is the parameter's: a
    norm's (`model.norm.weight`, one row), or the matrix of the embedding or of the head (a row a token). `added`: one
    row that is added to the output of the linear module `name`, a trained bias less the base's.
    """

    name: str
    kind: Literal["replaced", "added"]
    num_rows: int
    width: int


@lru_cache(maxsize=2**16)
def shared_extra(name: str, kind: Literal["replaced", "added"], num_rows: int, width: int) -> ExtraManifest:
    """As `shared_module`."""
    return ExtraManifest(name, kind, num_rows, width)


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """An adapter version. Two adapters with the same `version` are the same in every bit that is served."""

    version: str
    """Hex digest over the canonical config and the weights."""
    rank: int
    """The largest rank of any module."""
    targets: tuple[str, ...]
    """Last parts of the targeted modules' names, sorted: ("k_proj", "q_proj")."""
    modules: tuple[ModuleManifest, ...]
    num_bytes: int
    """Bytes of the weights in the served dtype, extras included."""
    extras: tuple[ExtraManifest, ...] = ()
    """Sorted by name. Most adapters have none, and only those that have any pay for them."""


Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """The weights of one version in host memory: read-only arrays, wide side contiguous, in the served dtype.

    This is where B is transposed against PEFT's files, once: for a linear module `a` is (rank, in_dim) and `b`
    (rank, out_dim); for an embedding `a` is token-major, (num_embeddings, rank), and `b` (rank, embedding_dim).
    """

    manifest: AdapterManifest
    dtype: Dtype
    tensors: Mapping[str, tuple[Array, Array]]
    """Module name -> (a, b); dtypes as in `NUMPY_DTYPES`."""
    extras: Mapping[str, Array] = field(default_factory=dict)
    """Name of an extra -> (num_rows, width)."""


Origin = Literal["admin", "config", "resolve"]
"""Who gave a name: the admin API, a config's desired set, or a request that named an adapter of a `resolve` source."""


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """A name and the version that it points at."""

    name: str
    version: str
    source: str
    key: str
    pinned: bool
    warm: int | Literal["all"]
    """On how many workers, beside those that had the former version, it was made resident."""
    origin: Origin
    manifest: AdapterManifest


@dataclass(frozen=True, slots=True)
class NameTable:
    """All names at one moment."""

    generation: int
    """Grows with every change of any name, also over restarts."""
    adapters: tuple[NamedAdapter, ...]
    """Sorted by name."""


@dataclass(frozen=True, slots=True)
class Desired:
    """What a worker may keep: versions without a name are to be let go as soon as nothing uses them."""

    generation: int
    versions: Mapping[str, bool]
    """Version that has a name -> whether a name that points at it is pinned."""
