"""How far back each layer attends, read from the masks that transformers would make.

Some models say their window in the mask alone. Paged attention is given no mask, so the masks are read once, before
the model is substituted; what a window cannot express is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lorafleet.workers.errors import UnsupportedModel

RECORDER = "lorafleet_recorder"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query position, key position) -> whether the query attends to the key, as transformers has it."""


@torch.inference_mode()
def read_windows(model: PreTrainedModel, max_model_len: int) -> Mapping[int, int | None]:
    """The sliding window of each layer whose mask tells it; None: it attends to all that came before.

    Raises UnsupportedModel for a layer that attends to anything else within `max_model_len` tokens.
    """
    _check_temperature(model, max_model_len)
    own = model.config._attn_implementation
    found: dict[int, MaskFunction] = {}
    made: list[tuple[Tensor, MaskFunction]] = []

    def make_mask(*, mask_function: MaskFunction, q_length: int, kv_length: int, **_: object) -> Tensor:
        mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=model.device)
        made.append((mask, mask_function))
        return mask

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
    ) -> tuple[Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        for mask, mask_function in made:
            if mask is attention_mask and isinstance(layer, int):
                found[layer] = mask_function
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(RECORDER, attend)
    AttentionMaskInterface.register(RECORDER, make_mask)
    try:
        model.set_attn_implementation(RECORDER)
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return {}  # it looks into its masks; the probe sees whether it is served right without any
    finally:
        model.set_attn_implementation(own)
    windows: dict[MaskFunction, int | None] = {}
    for layer, mask_function in found.items():
        if mask_function not in windows:
            windows[mask_function] = _window(mask_function, layer, max_model_len, model)
    return {layer: windows[mask_function] for layer, mask_function in found.items()}


def _window(mask_function: MaskFunction, layer: int, max_model_len: int, model: PreTrainedModel) -> int | None:
    name = type(model).__name__
    zero = torch.zeros((), dtype=torch.int64, device=model.device)
    positions = torch.arange(max_model_len + 1, device=model.device)
    last = positions[-2]
    if bool(mask_function(zero, zero, last, last + 1)):
        raise UnsupportedModel(f"{name}: layer {layer} attends to tokens that come after, not only to those before")
    from_first = mask_function(zero, zero, positions[:-1], zero).expand(max_model_len)
    if bool(from_first.all()):
        return None
    bound = int((~from_first).int().argmax())  # the first position that does not see the first token
    for query in {bound, min(2 * bound - 1, max_model_len - 1), max_model_len - 1}:
        seen = mask_function(zero, zero, positions[query], positions).expand(max_model_len + 1)
        if not torch.equal(seen, (positions > query - bound) & (positions <= query)):
            raise UnsupportedModel(
                f"{name}: layer {layer} attends within chunks of {bound} tokens, which is not supported: "
                f"set model.max_model_len to at most {bound}"
            )
    return bound


def _check_temperature(model: PreTrainedModel, max_model_len: int) -> None:
    """Llama 4 scales queries by their row of a pass, which is their position only in a pass of a whole sequence."""
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
            floor = getattr(module, "floor_scale", 0)
            if isinstance(floor, int | float) and max_model_len >= floor:
                raise UnsupportedModel(
                    f"{type(model).__name__} scales attention by the position from {floor} tokens on, which is not "
                    f"supported: set model.max_model_len to at most {int(floor) - 1}"
                )
