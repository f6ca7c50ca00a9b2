"""Records each layer's call of attention, in one pass of transformers' own model before it is substituted.

Heads and their sizes come from the tensors that a layer hands over, so no configuration need say them. Windows come
from the masks that transformers would make, since some models say them in the mask alone and paged attention is given
none. What attention over pages cannot do is refused here, by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.kv_cache import LayerKV
from lorafleet.workers.model.family_attention import adopted, choose
from lorafleet.workers.model.recurrent_layers import is_recurrent

RECORDER = "lorafleet_recorder"
NUM_TOKENS = 2
"""Of the recorded call."""

UNSUPPORTED_FEATURES = {
    "position_bias": "adds a bias by position to its scores",
}
"""Arguments of transformers' attention functions that change the result and are not implemented -> what they do."""

KNOWN_TENSORS = frozenset({"cache_position", "key_bias", "position_ids", "s_aux"})
"""Tensors among the arguments that are known, or say nothing new. Any other is refused by its name."""

MAX_HEAD_DIM = 512
"""Of the kernels: `kernels/attention.py`."""

MAX_LATENT_RANK, MAX_LATENT_ROTATED = 512, 128
"""The same of `kernels/latent.py`, for latents and for the rotated part of keys."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query position, key position) -> whether the query attends to the key, as transformers has it."""


@dataclass(frozen=True, slots=True)
class Latent:
    """A latent vector of each token, of which a linear module makes the keys and values of all heads."""

    rank: int
    """Elements of the latent vector."""
    rotated: int
    """Elements of the part of a key that is rotated, and is the same for all heads."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Arguments with which one layer calls attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of queries and keys."""
    value_dim: int
    window: int | None
    """The last so many tokens, the row's own among them, are attended to; None: all that came before."""
    latent: Latent | None = None
    """What pages keep in the place of keys and values; None: these."""

    @property
    def width(self) -> int:
        """Of a head's keys and values on pages, which are of one size."""
        return max(self.head_dim, self.value_dim)

    @property
    def kept(self) -> LayerKV:
        """Kept on pages of each token."""
        if self.latent is None:
            return LayerKV(self.num_kv_heads, self.width)
        return LayerKV(1, self.latent.rank + self.latent.rotated, has_values=False)


@torch.inference_mode()
def read_calls(model: PreTrainedModel, max_model_len: int, *, compresses: bool = False) -> dict[int, AttentionCall]:
    """The call of each layer that attends, by the layer's number; none may where layers keep states.

    `compresses`: pages are to keep latents, in the layers that have some.

    Raises UnsupportedModel for a call that attention over pages cannot answer within `max_model_len` tokens.
    """
    _check_temperature(model, max_model_len)
    try:
        found = _record(model, max_model_len, with_masks=True)
    except _CANNOT:
        # It looks into its masks; the probe sees whether it is served right without any.
        try:
            found = _record(model, max_model_len, with_masks=False)
        except _CANNOT as error:
            raise UnsupportedModel(
                f"{_name(model)} needs attention masks, which are not made here ({error})"
            ) from error
    if not found and not is_recurrent(model):
        raise UnsupportedModel(
            f"{_name(model)} does not attend through transformers' attention functions, which is not supported"
        )
    windows: dict[MaskFunction, int | None] = {}
    calls = {}
    for layer, seen in sorted(found.items()):
        window = seen.window
        if seen.mask_function is not None:
            if seen.mask_function not in windows:
                windows[seen.mask_function] = _window(seen.mask_function, layer, max_model_len, model)
            window = windows[seen.mask_function]
        calls[layer] = _checked(seen, layer, window, model)
        if compresses:
            calls[layer] = replace(calls[layer], latent=seen.latent)
    return calls


_CANNOT = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What models raise that are called in a way they were not made for."""


@dataclass(frozen=True, slots=True)
class _Seen:
    query: Tensor
    key: Tensor
    value: Tensor
    mask_function: MaskFunction | None
    window: int | None
    features: tuple[str, ...]
    """What it does that is not supported."""
    latent: Latent | None


def _record(model: PreTrainedModel, max_model_len: int, *, with_masks: bool) -> dict[int, _Seen]:
    own = model.config._attn_implementation
    found: dict[int, _Seen] = {}
    made: list[tuple[Tensor, MaskFunction]] = []

    def make_mask(*, mask_function: MaskFunction, q_length: int, kv_length: int, **_: object) -> Tensor | None:
        if not with_masks:
            return None
        mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=model.device)
        made.append((mask, mask_function))
        return mask

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        sliding_window: int | None = None,
        **features: object,
    ) -> tuple[Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise UnsupportedModel(f"{_name(model)}: a {type(module).__name__} attends, and has no number of a layer")
        if layer in found:
            raise UnsupportedModel(f"{_name(model)}: layer {layer} attends more than once for each token")
        mask_function = next((function for mask, function in made if mask is attention_mask), None)
        if mask_function is None and attention_mask is not None and not bool((attention_mask == 1).all()):
            raise UnsupportedModel(
                f"{_name(model)}: layer {layer} makes its own mask of what it attends to, which is not supported"
            )
        present = tuple(
            UNSUPPORTED_FEATURES.get(name, f"hands attention {name}")
            for name, given in features.items()
            if (given is not None and name in UNSUPPORTED_FEATURES)
            or (isinstance(given, Tensor) and name not in KNOWN_TENSORS)
        )
        expansion = expansions.pop(module, None)
        is_plain = all(features.get(name) is None for name in ("softcap", "s_aux", "key_bias"))
        latent = _latent(module, expansion, query, key, value) if expansion is not None and is_plain else None
        found[layer] = _Seen(query, key, value, mask_function, sliding_window, present, latent)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(RECORDER, attend)
    AttentionMaskInterface.register(RECORDER, make_mask)
    try:
        choose(model, RECORDER)
        with adopted(model, RECORDER, max_model_len), _expansions(model) as expansions:
            model(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        choose(model, own)
    return found


@dataclass(frozen=True, slots=True)
class _Expansion:
    """A call of a module's `expand_kv`, which makes keys and values of latents."""

    latents: Tensor
    rotated: Tensor
    keys: Tensor
    values: Tensor


@contextmanager
def _expansions(model: PreTrainedModel) -> Iterator[dict[nn.Module, _Expansion]]:
    """Within it, the last call of `expand_kv` by each module that has one is kept."""
    kept: dict[nn.Module, _Expansion] = {}
    modules = expanding(model)

    def recorded(module: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        own: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = module.expand_kv  # type: ignore[assignment]

        def expand(latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = own(latents, rotated)
            kept[module] = _Expansion(latents, rotated, keys, values)
            return keys, values

        return expand

    for module in modules:
        module.__dict__["expand_kv"] = recorded(module)
    try:
        yield kept
    finally:
        for module in modules:
            del module.__dict__["expand_kv"]


def expanding(model: nn.Module) -> list[nn.Module]:
    """The modules that make keys and values of latents, in a function of their own."""
    return [
        module
        for module in model.modules()
        if callable(getattr(module, "expand_kv", None)) and isinstance(getattr(module, "kv_b_proj", None), nn.Module)
    ]


def _latent(module: nn.Module, expansion: _Expansion, query: Tensor, key: Tensor, value: Tensor) -> Latent | None:
    """The latent of which the very keys and values of a call are made; None if another rule makes them.

    The rule: a linear module without a bias gives each head the first part of its keys, then its values. The second
    part of the keys is the rotated one.
    """
    linear = module.kv_b_proj
    if key is not expansion.keys or value is not expansion.values or type(linear) is not nn.Linear:
        return None
    latents, rotated = expansion.latents, expansion.rotated
    _, num_heads, num_tokens, head_dim = key.shape
    latent = Latent(latents.shape[-1], rotated.shape[-1])
    plain, value_dim = head_dim - latent.rotated, value.shape[3]
    shape = (num_heads * (plain + value_dim), latent.rank)
    if (
        linear.bias is not None
        or plain <= 0
        or linear.weight.shape != shape
        or latents.shape != (1, 1, num_tokens, latent.rank)
        or rotated.shape != (1, 1, num_tokens, latent.rotated)
        or query.shape != key.shape
        or (latents.is_cuda and (latent.rank > MAX_LATENT_RANK or latent.rotated > MAX_LATENT_ROTATED))
    ):
        return None
    expanded = linear(latents[0, 0]).view(num_tokens, num_heads, plain + value_dim).transpose(0, 1)
    pairs = (
        (key[0, :, :, :plain], expanded[..., :plain]),
        (key[0, :, :, plain:], rotated[0].expand(num_heads, -1, -1)),
        (value[0], expanded[..., plain:]),
    )
    is_rule = all(bool((one - other).abs().max() <= 0.02 * other.abs().max()) for one, other in pairs)
    return latent if is_rule else None


def _checked(seen: _Seen, layer: int, window: int | None, model: PreTrainedModel) -> AttentionCall:
    place = f"{_name(model)}: layer {layer}"
    if seen.features:
        raise UnsupportedModel(f"{place} {' and '.join(seen.features)}, which is not supported")
    _, num_heads, num_tokens, head_dim = seen.query.shape
    if num_tokens != NUM_TOKENS or seen.key.shape[2] != NUM_TOKENS:
        raise UnsupportedModel(f"{place} attends to {seen.key.shape[2]} keys where {NUM_TOKENS} tokens came")
    call = AttentionCall(num_heads, seen.key.shape[1], head_dim, seen.value.shape[-1], window)
    if model.device.type == "cuda" and call.width > MAX_HEAD_DIM:
        raise UnsupportedModel(f"{place} has heads of {call.width} elements; on a GPU {MAX_HEAD_DIM} are supported")
    return call


def _window(mask_function: MaskFunction, layer: int, max_model_len: int, model: PreTrainedModel) -> int | None:
    zero = torch.zeros((), dtype=torch.int64, device=model.device)
    positions = torch.arange(max_model_len + 1, device=model.device)
    last = positions[-2]
    if bool(mask_function(zero, zero, last, last + 1)):
        raise UnsupportedModel(
            f"{_name(model)}: layer {layer} attends to tokens that come after, not only to those before"
        )
    from_first = mask_function(zero, zero, positions[:-1], zero).expand(max_model_len)
    if bool(from_first.all()):
        return None
    bound = int((~from_first).int().argmax())  # the first position that does not see the first token
    for query in {bound, min(2 * bound - 1, max_model_len - 1), max_model_len - 1}:
        seen = mask_function(zero, zero, positions[query], positions).expand(max_model_len + 1)
        if not torch.equal(seen, (positions > query - bound) & (positions <= query)):
            raise UnsupportedModel(
                f"{_name(model)}: layer {layer} attends within chunks of {bound} tokens, which is not supported: "
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
                    f"{_name(model)} scales attention by the position from {floor} tokens on, which is not "
                    f"supported: set model.max_model_len to at most {int(floor) - 1}"
                )


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__
