"""Serves a small float32 copy of a base on the CPU before the base itself is loaded, and refuses what it gets wrong.

The probe of the base itself allows for the rounding of its dtype, and is short. The copy has the base's architecture,
few layers, loud random weights, and limits (windows, chunks) that its prompts are longer than. It computes prompts
whole and in parts, beside others, with random adapters on every module that may have one, and with norms in the
place of all that adapters may replace. All must be transformers' own answers to float32's rounding. What is not is
traced to the first module that differs. Where adapters on some kinds of modules alone make the difference, the base is
served, and they are refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.memory.state_store import StateStore
from lorafleet.workers.model import probe
from lorafleet.workers.model.attention_calls import read_calls
from lorafleet.workers.model.geometry import NORMS, geometry_of, kind_of, projection_groups, without
from lorafleet.workers.model.loader import base_of
from lorafleet.workers.model.module_trace import Trace, first_difference
from lorafleet.workers.model.probe import Piece
from lorafleet.workers.model.recurrent_layers import is_recurrent, take_plain_functions
from lorafleet.workers.model.rehearsal_adapters import Adapter, applied, publish
from lorafleet.workers.model.startup import start_runner

logger = logging.getLogger(__name__)

NUM_TOKENS = 40
MAX_LEN = 64
MIN_LEN = 16
"""A prompt in parts needs more tokens than the shortest length that may be served."""
LIMIT = 12
"""What limits that long sequences leave are lowered to."""
LIMITS = re.compile(r".*(window|chunk|original_max|floor_scale|index_topk|topk_blocks|index_block|rel_extent).*")
"""Names of such limits in configurations."""
MIN_LAYERS = 4
RANK = 2
SMALL: dict[str, int] = {
    "vocab_size": 320,
    "vocab_size_per_layer_input": 320,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
"""Sizes that are lowered to this, in models that can be made so."""
NARROW: dict[str, int] = {
    **SMALL,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
}
"""The same for a copy that is narrower, too; `head_dim` stays."""
NARROW_ROTARY: dict[str, int] = {"rotary_dim": 8}
"""And where heads become narrower with that."""
STATE_SPACES = (("mamba_n_heads", "mamba_d_head", "mamba_expand"), ("num_heads", "head_dim", "expand"))
"""Fields of Mamba 2's heads and their width, which together are so many times as wide as the hidden state."""
NUM_STATE_HEADS = 8
"""Of a narrow copy: as many as there are groups at most."""
MAX_PARAMETERS = 64_000_000
"""A copy that has more parameters takes seconds; it is not made."""
MAX_KINDS_OFF = 2
"""Where adapters on more kinds of modules are wrong, the base is not served."""
POOL_BYTES = 32 << 20
FOLDER = ".cache/lorafleet/rehearsals"
"""Below the home folder: what rehearsals found, so that another start need not rehearse the same base again."""

Steps = Sequence[Sequence[Piece]]


class _WrongBase(UnsupportedModel):
    """Without any adapter, a copy is not what transformers computes."""


class Finding(NamedTuple):
    """Outcome of a rehearsal."""

    reason: str | None = None
    """Why the base is not served."""
    without: frozenset[str] = frozenset()
    """Kinds of modules on which adapters are not, as `geometry.without` takes them."""


def rehearse(config: PretrainedConfig, max_model_len: int, *, compresses: bool = False) -> frozenset[str]:
    """Raise UnsupportedModel when a small copy of the base is not computed as transformers computes it.

    `compresses`: as in `read_calls`. Returns the kinds of modules on which adapters are not served.
    """
    digest = hashlib.sha256(_code().encode())
    fields = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    digest.update(f"{max_model_len} {compresses} {json.dumps(fields, sort_keys=True, default=str)}".encode())
    kept = Path.home() / FOLDER / f"{digest.hexdigest()[:32]}.json"
    found: Finding | None = None
    with suppress(OSError, ValueError, KeyError):
        known = json.loads(kept.read_text())
        found = Finding(known["reason"], frozenset(known["without"]))
    if found is None:
        is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        restore = take_plain_functions(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]) if is_known else None
        try:
            found = _find(config, max_model_len, compresses=compresses)
        finally:
            if restore is not None:
                restore()
        _keep(found, kept)
    if found.reason is not None:
        raise UnsupportedModel(found.reason)
    if found.without:
        logger.warning(
            "%s is served without adapters on %s, which would be computed wrong",
            config.model_type,
            ", ".join(sorted(found.without)),
        )
    return found.without


def _keep(found: Finding, kept: Path) -> None:
    with suppress(OSError):  # it is rehearsed again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{id(found)}")
        written.write_text(json.dumps({"reason": found.reason, "without": sorted(found.without)}))
        written.replace(kept)


@cache
def _code() -> str:
    """A digest of what a rehearsal's outcome depends on beside the base."""
    digest = hashlib.sha256("".join(version(name) for name in ("torch", "transformers")).encode())
    floors = Path(__file__).parents[2]
    for folder in ("kernels", "workers"):
        for path in sorted((floors / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _find(config: PretrainedConfig, max_model_len: int, *, compresses: bool) -> Finding:
    try:
        for sizes in (NARROW, SMALL, {}):
            plain = _copy(config, sizes, 0)
            if plain is not None:
                read_calls(plain, max_model_len)  # so that a refusal speaks of the base's own limits
                made = _copy(config, sizes, max_model_len) or plain
                longest = max(MIN_LEN, min(max_model_len, MAX_LEN))
                try:
                    _Rehearsal(copy.deepcopy(made), longest, compresses=compresses).run()
                except _WrongBase:
                    raise
                except UnsupportedModel:
                    off = _kinds_off(made, longest, compresses=compresses)
                    if not off:
                        raise
                    return Finding(without=off)
                return Finding()
        logger.info("no small copy of %s can be made; it is probed as it is only", config.model_type)
    except UnsupportedModel as error:
        return Finding(str(error))
    return Finding()


def _kinds_off(model: PreTrainedModel, max_model_len: int, *, compresses: bool) -> frozenset[str]:
    """Kinds of modules on which adapters alone make what differs; none if it is the base itself, or many of them."""

    def is_right(off: frozenset[str]) -> bool:
        try:
            return _Rehearsal(copy.deepcopy(model), max_model_len, compresses=compresses, off=off).is_right()
        except UnsupportedModel:
            return False

    kinds = frozenset(kind_of(name, shape) for name, shape in geometry_of(model, "float32").modules.items())
    found: frozenset[str] = frozenset()
    for kind in sorted(kinds):
        if not is_right(kinds - {kind} | {NORMS}):
            found |= {kind}
        if len(found) > MAX_KINDS_OFF:
            return frozenset()
    return next((off for off in (found, found | {NORMS}) if off and is_right(off)), frozenset())


# --- the copy ---


def small_config(config: PretrainedConfig, sizes: dict[str, int], max_model_len: int) -> PretrainedConfig:
    """The configuration with few layers, of each kind at least one, small `sizes`, and limits that are soon left.

    Limits that sequences of `max_model_len` tokens do not leave stay as they are.
    """
    small: Any = copy.deepcopy(config)
    num_layers = small.num_hidden_layers
    kinds = {name: value for name, value in vars(small).items() if isinstance(value, list) and len(value) == num_layers}
    kind_of = [tuple(repr(value[layer]) for value in kinds.values()) for layer in range(num_layers)]
    count = min(num_layers, max(MIN_LAYERS, 1 + max((kind_of.index(kind) for kind in set(kind_of)), default=0)))
    num_sharing = getattr(small, "num_kv_shared_layers", None) or 0
    if num_sharing:  # the last layers use the KV of earlier ones, of which each kind must be there
        num_sharing = min(num_sharing, count)
        count = min(num_layers, count + num_sharing)
        small.num_kv_shared_layers = num_sharing
    for name, value in kinds.items():
        setattr(small, name, value[:count])
    small.num_hidden_layers = count
    parameters = getattr(small, "rope_parameters", None)
    for fields in (vars(small), parameters if isinstance(parameters, dict) else {}):
        for name, value in list(fields.items()):
            if LIMITS.fullmatch(name) and type(value) is int and LIMIT < value < max_model_len:
                fields[name] = LIMIT
    num_heads, of_keys = _field(small, "num_attention_heads"), ("num_key_value_heads", "num_kv_heads")
    sizes = {
        name: sizes["num_attention_heads"] if name in of_keys and _field(small, name) == num_heads else most
        for name, most in sizes.items()
    }
    if _field(small, "head_dim") is None:
        sizes |= NARROW_ROTARY if "num_attention_heads" in sizes else {}
    for name, most in sizes.items():
        if type(_field(small, name)) is int:
            setattr(small, name, min(_field(small, name), most))
    for name_of_heads, name_of_width, factor in STATE_SPACES:
        is_free = getattr(small, "mamba_d_ssm", None) is not None  # the width says itself
        fields = (name_of_heads, name_of_width, factor)
        if "hidden_size" in sizes and not is_free and all(hasattr(small, name) for name in fields):
            setattr(small, name_of_heads, NUM_STATE_HEADS)
            setattr(small, name_of_width, int(small.hidden_size * getattr(small, factor)) // NUM_STATE_HEADS)
    own_fields = getattr(vars(small).get("_heterogeneity_spec"), "per_layer_overrides", {})
    if own_fields:  # of layers that differ from the others
        small.per_layer_config = {
            layer: {name: min(value, sizes[name]) if name in sizes else value for name, value in fields.items()}
            for layer, fields in own_fields.items()
            if layer < count
        }
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small


def _field(config: PretrainedConfig, name: str) -> Any:
    """A field by any of its names, whatever single layers have in its place."""
    return vars(config).get(config.attribute_map.get(name, name))


def _copy(config: PretrainedConfig, sizes: dict[str, int], max_model_len: int) -> PreTrainedModel | None:
    """A copy that transformers itself computes; None when there is none of a bearable size."""
    try:
        small = small_config(config, sizes, max_model_len)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(small)
        is_recurrent(empty)  # in a form that is known, or it raises
        num_parameters = sum(value.numel() for value in empty.parameters())
        if num_parameters > MAX_PARAMETERS:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(1, NUM_TOKENS)[None], use_cache=False).logits
            head = model.get_output_embeddings()
            if head is not None:
                head.weight.data.mul_(3 / logits.std())  # rounding is of the logits' size
    except UnsupportedModel:
        raise
    except Exception:  # whatever a shrunken configuration does to a model, the base itself is still to be probed
        logger.debug("a small copy of %s cannot be computed", config.model_type, exc_info=True)
        return None
    return model if bool(logits.isfinite().all()) else None


# --- its answers ---


class _Rehearsal:
    """A copy twice, as transformers has it and substituted, and three prompts: two of them with an adapter."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_model_len: int,
        *,
        compresses: bool = False,
        off: frozenset[str] = frozenset(),
    ) -> None:
        """off: kinds of modules on which adapters are not."""
        num_tokens = min(NUM_TOKENS, max_model_len)
        base = base_of(model, model.config, "float32", max_model_len, num_tokens, compresses=compresses)
        base = replace(base, geometry=without(base.geometry, off))
        self.name = type(model).__name__
        self.own = copy.deepcopy(model)
        self.cache = KVCache(base.layers, num_pages=16, page_tokens=16, dtype=torch.float32, device=base.device)
        linear = [name for name, shape in base.geometry.modules.items() if shape.kind == "linear"]
        layout = PoolLayout.of(base.geometry, projection_groups(linear), RANK)
        pool = AdapterPool(layout, pool_bytes=max(POOL_BYTES, layout.page_bytes), max_slots=2, device=base.device)
        generator = torch.Generator().manual_seed(1)
        self.adapters = [Adapter(), *publish(pool, self.own, base.geometry, RANK, generator)]
        self.prompts = torch.randint(base.vocab_size, (len(self.adapters), num_tokens), generator=generator).tolist()
        self.pages = [self.cache.allocate(self.cache.pages_for(num_tokens)) for _ in self.prompts]
        states = StateStore(base.states, num_slots=len(self.prompts), device=base.device)
        self.states = [states.acquire() for _ in self.prompts]
        self.runner = start_runner(
            base, self.cache, pool, states, max_pages=self.cache.pages_for(max_model_len + 1), is_probed=False
        )

    def is_right(self) -> bool:
        """Return True if all answers are transformers' own."""
        if self._is_right(self._mixed()):
            return True
        if self.runner.can_recompute:
            self.runner.body.may_keep = False
            return self._is_right(self._mixed())
        return False

    def run(self) -> None:
        """Raise UnsupportedModel, naming what differs first, unless all answers are transformers' own."""
        refused = None
        try:
            if self.is_right():
                return
        except UnsupportedModel as error:
            refused = error  # there may be more to say
        n = len(self.prompts[0])
        self._compare([[self._piece(0, 0, n)]], "even of a prompt by itself")
        parts = [[self._piece(0, 0, n // 2)], [self._piece(0, n // 2, n)]]
        self._compare(parts, "when a prompt comes in parts (it may keep more of earlier tokens than keys and values)")
        if refused is not None:
            raise _WrongBase(str(refused)) from refused
        self._compare(self._mixed(), "in a batch with others and their adapters")

    def _compare(self, steps: Steps, how: str) -> None:
        for index in range(len(self.prompts)):
            if not self._is_right(steps, index):
                where, is_alone = self._first_difference(steps, index), all(len(pieces) == 1 for pieces in steps)
                error = _WrongBase if index == 0 and is_alone else UnsupportedModel
                raise error(f"{self.name}: {where} computes something else than in transformers {how}")

    def _mixed(self) -> Steps:
        """Whole prompts, parts of prompts and single tokens side by side, in three steps."""
        n, last = len(self.prompts[0]), len(self.prompts) - 1
        if last == 0:  # no adapter fits
            return [[self._piece(0, 0, n // 3)], [self._piece(0, n // 3, n - 1)], [self._piece(0, n - 1, n)]]
        return [
            [self._piece(last, 0, 1), self._piece(0, 0, n // 4), self._piece(1, 0, n)],
            [self._piece(0, n // 4, n // 4 + 1), self._piece(last, 1, n - 2)],
            [self._piece(0, n // 4 + 1, n), self._piece(last, n - 2, n)],
        ]

    def _piece(self, index: int, start: int, end: int) -> Piece:
        has_extras = bool(self.adapters[index].replaced)
        pages, state = self.pages[index], self.states[index]
        return Piece(self.prompts[index], start, end, pages, state, slot=index - 1, has_extras=has_extras)

    def _is_right(self, steps: Steps, index: int | None = None) -> bool:
        """Return True if the answers of the steps, or only to one of the prompts, are transformers' own."""
        answers = probe.answer(self.runner, steps)
        indices = {piece.slot + 1 for pieces in steps for piece in pieces}
        for one in indices if index is None else indices & {index}:
            rows = [
                rows
                for pieces, logits in zip(steps, answers, strict=True)
                for piece, rows in zip(pieces, torch.split(logits, [p.end - p.start for p in pieces]), strict=True)
                if piece.slot + 1 == one
            ]
            if not probe.difference(torch.cat(rows), self._own_logits(one)) <= probe.TOLERANCE["float32"]:
                return False
        return True

    @torch.inference_mode()
    def _own_logits(self, index: int, trace: Trace | None = None) -> Tensor:
        """(tokens, vocab): transformers' own answer to a prompt with its adapter, which `trace` sees, too."""
        with applied(self.own, self.adapters[index]), trace or nullcontext():
            logits: Tensor = self.own(input_ids=torch.tensor([self.prompts[index]]), use_cache=False).logits[0]
        return logits

    def _first_difference(self, steps: Steps, index: int) -> str:
        """The module that first computes something else for the prompt."""
        own = Trace(self.own)
        self._own_logits(index, own)
        rows = []
        with Trace(self.runner.base.model) as ours:
            for pieces in steps:
                ours.begin_step()
                probe.answer(self.runner, [pieces])
                starts = [sum(p.end - p.start for p in pieces[:at]) for at in range(len(pieces))]
                total = sum(p.end - p.start for p in pieces)
                spans = (
                    range(start, start + piece.end - piece.start)
                    for start, piece in zip(starts, pieces, strict=True)
                    if piece.slot + 1 == index
                )
                rows.append((next(spans, range(0)), total))
        return first_difference(own, ours, rows) or "its head"
