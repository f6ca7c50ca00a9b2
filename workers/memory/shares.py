"""A rank's part of each of the base's modules, and what of an adapter goes with it.

A linear module is cut by its outputs or by its inputs, an embedding by its tokens. An adapter's factors are cut
like the module: A by inputs, B by outputs. The other factor is whole on every rank. Of a mixture's experts each rank
has some, whole, and of an adapter both factors of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorafleet.adapter_store.manifest import Array, ExtraManifest, ModuleShape, magnitude_of


@dataclass(frozen=True, slots=True)
class Share:
    """A run of a module's inputs and a run of its outputs."""

    shape: ModuleShape
    """Of the part."""
    first_input: int = 0
    """For an embedding its first token."""
    first_output: int = 0
    first_expert: int = 0

    @staticmethod
    def whole(shape: ModuleShape) -> Share:
        """All of a module."""
        return Share(shape)

    @staticmethod
    def of_outputs(shape: ModuleShape, first: int, count: int) -> Share:
        """`count` outputs from `first` on, of all inputs."""
        return Share(ModuleShape(shape.kind, shape.in_dim, count), first_output=first)

    @staticmethod
    def of_inputs(shape: ModuleShape, first: int, count: int) -> Share:
        """`count` inputs (tokens of an embedding) from `first` on: the outputs are sums over ranks."""
        return Share(ModuleShape(shape.kind, count, shape.out_dim), first_input=first)

    @staticmethod
    def of_experts(shape: ModuleShape, first: int, count: int) -> Share:
        """`count` experts from `first` on, each of them whole."""
        return Share(replace(shape, num_experts=count), first_expert=first)

    @property
    def inputs(self) -> slice:
        return slice(self.first_input, self.first_input + self.shape.in_dim)

    @property
    def outputs(self) -> slice:
        return slice(self.first_output, self.first_output + self.shape.out_dim)

    def of_parameter(self, num_dims: int) -> tuple[slice, ...]:
        """The place of the part in a parameter of the module: a matrix of a linear module is (outputs, inputs).

        A parameter of experts has one of its own for each.
        """
        if self.shape.kind == "experts":
            here = slice(self.first_expert, self.first_expert + self.shape.num_experts)
            return (here, *(slice(None),) * (num_dims - 1))
        if self.shape.kind == "embedding":
            return self.inputs, self.outputs
        return (self.outputs, self.inputs)[:num_dims]

    def of_factors(self, a: Array, b: Array) -> tuple[Array, Array]:
        """The parts of a module's factors that are here, as in `AdapterWeights`: views of them."""
        return a[self.inputs] if self.shape.kind == "embedding" else a[:, self.inputs], b[:, self.outputs]


def share_of(parameter: str, shares: Mapping[str, Share]) -> Share | None:
    """The part that is here of a parameter of the base, by its name; None: it is here whole."""
    of_experts = shares.get(parameter) or shares.get(parameter.removesuffix("_bias"))
    return of_experts or shares.get(parameter.rpartition(".")[0])


@dataclass(frozen=True, slots=True)
class ExtraPart:
    """The part of an extra that a rank holds: a run of its rows, and of its columns."""

    first_row: int
    num_rows: int
    first_column: int
    width: int


def part_of_extra(extra: ExtraManifest, shares: Mapping[str, Share]) -> ExtraPart:
    """The part of an extra that goes with this rank's part of its module. `shares`: as in `PoolLayout.of`.

    Norms are whole on every rank, and so are rows that come after a module's own.
    """
    share = shares.get(extra.name.removesuffix(".weight").removesuffix(magnitude_of("")))
    if share is None:
        return ExtraPart(0, extra.num_rows, 0, extra.width)
    if extra.kind != "replaced":
        return ExtraPart(0, 1, share.first_output, share.shape.out_dim)
    if share.shape.kind == "embedding":
        return ExtraPart(share.first_input, share.shape.in_dim, 0, extra.width)
    return ExtraPart(share.first_output, share.shape.out_dim, 0, extra.width)
