"""Substitutes for the base's norms that give rows of some adapters parameters of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lorafleet.kernels.weights import OwnVector
from lorafleet.workers.memory.extra_rows import ExtraVector
from lorafleet.workers.model.lora_context import LoraContext, Owner, Place, place_of


class AdapterNorm(nn.Module):
    """A norm as it is, computed once more for the rows of each adapter that replaces a parameter of it."""

    def __init__(
        self,
        base: nn.Module,
        name: str,
        context: LoraContext,
        place: Place,
        own_weight: OwnVector | None = None,
    ) -> None:
        """own_weight: where the weights of rows are that have their own; for layers that read them on the device."""
        super().__init__()
        self.own_weight = own_weight
        self.base = base
        self.name = name
        self.context = context
        self.place: Place = place
        self.replaceable = {parameter: f"{name}.{parameter}" for parameter, _ in base.named_parameters()}

    @property
    def weight(self) -> Tensor:
        """(width,): some models look at their norms' weights."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (1, rows, ..., width), or (rows, width) -> the same shape."""
        y: Tensor = self.base(x)
        axis = min(1, x.dim() - 2)
        for rows, parameters in self.replaced(x.shape[axis]):
            own: Tensor = functional_call(self.base, parameters, (x.index_select(axis, rows),))
            y.index_copy_(axis, rows, own.to(y.dtype))
        return y

    def replaced(self, num_rows: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Rows of the running pass, int64, and the parameters that they have instead of the base's, by name.

        `num_rows`: how many rows the norm is given.
        """
        owners = self.context.owners(self.context.segments_at(self.place, self.name, num_rows))
        found = [(owner.rows, self.parameters_of(owner)) for owner in owners]
        return [(rows, parameters) for rows, parameters in found if parameters]

    def parameters_of(self, owner: Owner) -> dict[str, Tensor]:
        """The parameters of this norm that the owner replaces, by name."""
        found = {parameter: owner.extras.get(name) for parameter, name in self.replaceable.items()}
        return {parameter: row.value for parameter, row in found.items() if isinstance(row, ExtraVector)}


def substitute_norms(
    model: PreTrainedModel, parameters: Collection[str], context: LoraContext, view: Callable[[str], OwnVector]
) -> None:
    """Put a substitute in the place of every norm that has one of these parameters. `view`: `AdapterPool.vector`."""
    for name in sorted({parameter.rpartition(".")[0] for parameter in parameters}):
        base, weight = model.get_submodule(name), f"{name}.weight"
        own_weight = view(weight) if weight in parameters else None
        model.set_submodule(name, AdapterNorm(base, name, context, place_of(model, name), own_weight))
