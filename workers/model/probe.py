"""Runs sequences through a substituted model, step by step, and says how far its answers are off transformers' own.

Used on the base itself at start (`check`), and by the rehearsal on a small copy of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lorafleet.kernels.segments import BASE_SLOT
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.model.geometry import TORCH_DTYPES
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.step.layout import Layout
from lorafleet.workers.step.message import StepMessage
from lorafleet.workers.step.sampling import NO_SAMPLING

logger = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1.5e-1}
"""Mean difference from the untouched model's logprobs, over the likeliest tokens, that rounding explains."""
MOST_OF_KV = 0.5
"""Most that the rounding of keys and values may add."""
TOP = 32
PASS_ROWS = 4
"""Rows of a pass over the head: a probe takes several."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one sequence in one step."""

    token_ids: Sequence[int]
    """All of the sequence."""
    start: int
    end: int
    """The step computes tokens from `start` on and before `end`; those before are in the cache."""
    pages: Sequence[int]
    state: int
    """Slot of its recurrent states."""
    slot: int = BASE_SLOT
    has_extras: bool = False
    """Whether the adapter has more than low-rank factors."""


def step_of(pieces: Sequence[Piece], page_tokens: int) -> StepMessage:
    """A step of these pieces, those of one row first, with the logits of all rows."""
    counts = [piece.end - piece.start for piece in pieces]
    assert sorted(counts, key=lambda count: count > 1) == counts, "decodes come first"
    spans = [np.arange(piece.start, piece.end) for piece in pieces]
    tables = np.zeros((len(pieces), max(len(piece.pages) for piece in pieces)), dtype=np.int64)
    for line, piece in zip(tables, pieces, strict=True):
        line[: len(piece.pages)] = piece.pages
    positions, owners = np.concatenate(spans), np.repeat(np.arange(len(pieces)), counts)
    layout = Layout(
        token_ids=np.concatenate([piece.token_ids[piece.start : piece.end] for piece in pieces]),
        positions=positions,
        row_pages=tables[owners, positions // page_tokens],
        row_offsets=positions % page_tokens,
        row_slots=np.array([piece.slot for piece in pieces], dtype=np.int32)[owners],
        query_lengths=np.array(counts),
        context_lengths=np.array([piece.end for piece in pieces]),
        tables=tables,
        logits_rows=np.arange(len(positions)),
        targets=np.zeros(0, dtype=np.int64),
        state_slots=np.array([piece.state for piece in pieces]),
    )
    return layout.pack(
        form=None,
        chunk_length=None,
        max_chunks=None,
        pass_rows=(1, PASS_ROWS),
        num_sampled=(),
        num_prompt_tops=0,
        sampling=NO_SAMPLING,
        has_extras=any(piece.has_extras for piece in pieces),
    )


def answer(runner: ModelRunner, steps: Sequence[Sequence[Piece]]) -> list[Tensor]:
    """(rows, vocab) logits of each step. Raises UnsupportedModel when the model cannot be called so."""
    try:
        return [torch.cat(runner.logits(step_of(pieces, runner.cache.page_tokens))) for pieces in steps]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        name = type(runner.base.model).__name__
        logger.info("%s cannot be computed on pages", name, exc_info=error)
        raise UnsupportedModel(
            f"{name} cannot be computed on pages: its layers ask for more than a step gives them, which is tokens, "
            "positions, and keys and values on pages"
        ) from error


def difference(logits: Tensor, wanted: Tensor) -> float:
    """Return the mean distance of logprobs over the likeliest tokens. Both arguments are (rows, vocab) logits."""
    expected, got = wanted.float().log_softmax(-1), logits.float().log_softmax(-1)
    likely = expected.topk(min(TOP, expected.shape[-1]), dim=-1).indices
    return float((got - expected).abs().gather(-1, likely).mean())


def check(runner: ModelRunner) -> None:
    """Raise UnsupportedModel for a base that the substituted model does not compute as transformers does.

    It computes the prompt in parts, the last one token long, so that what came before must come from the cache, and
    the logits of a part in passes.
    """
    base = runner.base
    name, tolerance = type(base.model).__name__, TOLERANCE[base.dtype]
    if base.rounded_probe_logits is not None:
        # Both round activations, and hardly ever the same way.
        tolerance += 2 * difference(base.rounded_probe_logits, base.probe_logits)
    with _exact_cache(runner):
        off = _difference(runner)
        if not off <= tolerance and runner.can_recompute:
            runner.body.may_keep = False
            off = _difference(runner)
            logger.info("%s: its body is computed anew for each pass over the head", name)
    if not off <= tolerance:
        raise UnsupportedModel(
            f"{name} computes something that is not supported: a probe's logprobs are {off:.2g} off transformers' own "
            f"in the mean, more than {tolerance:g}"
        )
    if runner.cache.key_scales is not None:
        rounded_off = _difference(runner)
        logger.info("%s: fp8 keys and values move a probe's logprobs by %.2g in the mean", name, rounded_off - off)
        if not rounded_off <= tolerance + MOST_OF_KV:
            raise UnsupportedModel(
                f"{name} needs more exact keys and values than worker.kv_dtype: fp8: a probe's logprobs are "
                f"{rounded_off:.2g} off transformers' own in the mean: use kv_dtype: auto"
            )


@contextmanager
def _exact_cache(runner: ModelRunner) -> Iterator[None]:
    """Within it, keys and values are kept in the base's dtype: their rounding to fp8 is no error of the layers."""
    cache, base = runner.cache, runner.base
    if cache.key_scales is None:
        yield
        return
    num_pages = cache.pages_for(len(base.probe_token_ids))
    exact = KVCache(
        base.layers,
        num_pages=num_pages,
        page_tokens=cache.page_tokens,
        dtype=TORCH_DTYPES[base.dtype],
        device=base.device,
    )
    with runner.reading(exact):
        yield


def _difference(runner: ModelRunner) -> float:
    tokens = runner.base.probe_token_ids.tolist()
    pages, state = runner.cache.allocate(runner.cache.pages_for(len(tokens))), runner.states.acquire()
    bounds = (0, len(tokens) // 2, len(tokens) - 1, len(tokens))
    try:
        parts = answer(runner, [[Piece(tokens, start, end, pages, state)] for start, end in pairwise(bounds)])
    finally:
        runner.cache.free(pages)
        runner.states.release(state)
    return difference(torch.cat(parts), runner.base.probe_logits)
