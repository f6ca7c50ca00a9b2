"""An adapter version: its identity, its targets, its size, and its weights in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

_PART = r"[A-Za-z0-9_][A-Za-z0-9._@+=~-]{0,127}"
NAME_GRAMMAR: Final = rf"(?:/\.?)?{_PART}(?:/\.?{_PART}){{0,15}}"
"""What adapters may be called: `shout`, `org/name@revision`, `policy@12`, a path. A name is never used as one."""
NAME_RULE: Final = (
    "a name is up to 16 parts with / between them, each of up to 128 of A-Z, a-z, 0-9 and . _ @ + = ~ -, and begins "
    "with a letter, a digit or _ (a . may precede it)"
)
"""The grammar for people."""

Dtype = Literal["float32", "float16", "bfloat16"]

NUMPY_DTYPES: Mapping[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""How each dtype lies in a numpy array; numpy has no bfloat16, so its bits travel as uint16."""


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A base-model module that an adapter may target."""

    kind: Literal["linear", "embedding", "experts", "router"]
    """The last two are parameters of a module of their own: PEFT's `target_parameters` names them, no module does.

    `experts` is one tensor of matrices, an expert's each, and bears the parameter's name. `router` bears its module's.
    """
    in_dim: int
    """Input width; the vocabulary for an embedding."""
    out_dim: int
    num_experts: int = 1
    """Matrices that each have an A and a B of the adapter's rank."""
    is_swapped: bool = False
    """PEFT takes the inputs of such experts for outputs: in its files, A is on their outputs and B on their inputs."""

    @property
    def is_module(self) -> bool:
        """Return True if `target_modules` may name it."""
        return self.kind in ("linear", "embedding")

    def num_elements(self, rank: int) -> int:
        """Elements of A and B together."""
        return rank * self.num_experts * (self.in_dim + self.out_dim)


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
    parameters: frozenset[str] = frozenset()
    """Names of all parameters of the base, so that a refusal tells what cannot be changed from what is not there."""
    whole_names: Mapping[str, str] = field(default_factory=dict)
    """Module of the text part of a multimodal checkpoint -> its name in the whole model, by which PEFT knows it too."""
    left_out: frozenset[str] = frozenset()
    """Modules of the whole model that are not served: towers of images and sound."""
    kinds: tuple[str, ...] = ()
    """The model's class and type, by which transformers knows how it renames a checkpoint's weights on load."""


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


_TUPLES: dict[tuple[int, ...], tuple[ModuleManifest, ...]] = {}
_MAX_TUPLES = 2**10


def shared_modules(modules: Iterable[ModuleManifest]) -> tuple[ModuleManifest, ...]:
    """As `shared_module`, for all modules of an adapter: the collector then looks through them once, not ten thousand
    times.
    """
    given = tuple(modules)
    if len(_TUPLES) >= _MAX_TUPLES:
        _TUPLES.clear()
    # A tuple that is kept keeps its modules, so nothing else has their ids.
    return _TUPLES.setdefault(tuple(map(id, given)), given)


ExtraKind = Literal["replaced", "added", "magnitude", "appended"]


@dataclass(frozen=True, slots=True)
class ExtraManifest:
    """An extra of an adapter version, beside low-rank factors: `num_rows` rows of `width` elements.

    `replaced`: a parameter that replaces the base's parameter `name` for the adapter's rows. It is a norm's
    (`model.norm.weight`, one row), or the matrix of the embedding or of the head (a row a token). `added`: one row that
    is added to the output of the linear module `name`: a trained bias less the base's. `magnitude`: one row, DoRA's.
    The worker divides it by the norms of the base's weight with scaling * B @ A. Its `name` is as `magnitude_of`.
    `appended`: rows after the base's of an embedding or a head, of tokens that the base lacks. Its `name` is as
    `appended_to`.
    """

    name: str
    kind: ExtraKind
    num_rows: int
    width: int


@lru_cache(maxsize=2**16)
def shared_extra(name: str, kind: ExtraKind, num_rows: int, width: int) -> ExtraManifest:
    """As `shared_module`."""
    return ExtraManifest(name, kind, num_rows, width)


def magnitude_of(module: str) -> str:
    """The name of a module's magnitudes, in PEFT's files and among extras."""
    return f"{module}.lora_magnitude_vector"


def appended_to(module: str) -> str:
    """The name of the rows that come after a module's own."""
    return f"{module}.weight.appended"


@dataclass(frozen=True, slots=True)
class OwnToken:
    """A token that an adapter's tokenizer has beside the base's. Its fields are those of tokenizers' `AddedToken`."""

    id: int
    content: str
    special: bool = False
    """It has no text in answers."""
    normalized: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class AdapterChat:
    """An adapter's own form of conversations and tokens, if its folder has one."""

    template: str | None
    """Its chat template; None: the base's."""
    end_token_ids: tuple[int, ...]
    """Tokens that end its answers, beside the base's own."""
    own_tokens: tuple[OwnToken, ...] = ()
    """In the order of their ids, which follow the base's tokenizer's."""


@lru_cache(maxsize=2**12)
def shared_chat(
    template: str | None, end_token_ids: tuple[int, ...], own_tokens: tuple[OwnToken, ...] = ()
) -> AdapterChat:
    """As `shared_module`: adapters of one trainer have the same template."""
    return AdapterChat(template, end_token_ids, own_tokens)


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
    invocation: tuple[int, ...] = ()
    """Tokens with whose last occurrence in a prompt the adapter begins (activated LoRA); empty: it always computes."""
    vocabulary: int | None = None
    """How many tokens it knows; None: those of the base."""
    warnings: tuple[str, ...] = field(default=(), compare=False)
    """What its author may not expect: parts of the config or the folder that change nothing. No part of the version."""
    chat: AdapterChat | None = None
    """What the folder says of conversations; None: nothing."""


Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """The weights of one version in host memory: one read-only array of all tensors, in the served dtype.

    B is transposed here against PEFT's files, and nowhere else. For a linear module `a` is (rank, in_dim) and `b`
    (rank, out_dim). Experts have these one after another's: (num_experts * rank, ...). For an embedding
    `a` is token-major, (num_embeddings, rank), and `b` (rank, embedding_dim).
    """

    manifest: AdapterManifest
    dtype: Dtype
    flat: Array
    """(num_elements,) contiguous, dtype as in `NUMPY_DTYPES`: a and then b of each module, then each extra, end to end,
    modules and extras in the manifest's order.
    """
    shapes: tuple[tuple[int, int], ...]
    """Of the tensors in `flat`, in their order."""

    @classmethod
    def of(
        cls,
        manifest: AdapterManifest,
        dtype: Dtype,
        tensors: Mapping[str, tuple[Array, Array]],
        extras: Mapping[str, Array] | None = None,
    ) -> AdapterWeights:
        """Copy the tensors, which may have any strides, into one array: both are in memory for a moment.

        `tensors` and `extras` are as the properties say, in the manifest's order.
        """
        extras = extras or {}
        assert [*tensors] == [module.name for module in manifest.modules], manifest.version
        assert [*extras] == [extra.name for extra in manifest.extras], manifest.version
        for module, (a, b) in zip(manifest.modules, tensors.values(), strict=True):
            assert len(b) % module.rank == 0, (module, b.shape)
            assert len(b) == len(a) or module.rank == a.shape[1], (module, a.shape)
        for extra, array in zip(manifest.extras, extras.values(), strict=True):
            assert array.shape == (extra.num_rows, extra.width), (extra, array.shape)
        arrays = [*(array for pair in tensors.values() for array in pair), *extras.values()]
        flat: Array = np.empty(sum(array.size for array in arrays), NUMPY_DTYPES[dtype])
        assert flat.nbytes == manifest.num_bytes, (flat.nbytes, manifest.num_bytes)
        shapes = tuple((len(array), array.shape[1]) for array in arrays)
        for view, array in zip(_cut(flat, shapes), arrays, strict=True):
            assert view.dtype == array.dtype, (view.dtype, array.dtype)
            view[:] = array
        flat.setflags(write=False)
        return cls(manifest, dtype, flat, shapes)

    @property
    def tensors(self) -> dict[str, tuple[Array, Array]]:
        """Module name -> (a, b), views of `flat`."""
        views = _cut(self.flat, self.shapes)
        return {module.name: (next(views), next(views)) for module in self.manifest.modules}

    @property
    def extras(self) -> dict[str, Array]:
        """Name of an extra -> (num_rows, width), a view of `flat`."""
        views = islice(_cut(self.flat, self.shapes), 2 * len(self.manifest.modules), None)
        return {extra.name: view for extra, view in zip(self.manifest.extras, views, strict=True)}


def _cut(flat: Array, shapes: Iterable[tuple[int, int]]) -> Iterator[Array]:
    """Views of these shapes, end to end."""
    first = 0
    for rows, columns in shapes:
        last = first + rows * columns
        yield flat[first:last].reshape(rows, columns)
        first = last
    assert first == flat.size, (first, flat.size)
