"""How every Triton kernel is launched; and how a process that starts has its kernels compiled, many at a time, first.

Triton compiles a kernel when it is first launched, on one core. Within `compiled_ahead` launches compute nothing: what
they need is compiled by threads, and launches after it find it done.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton

_seen: ContextVar[set[Hashable] | None] = ContextVar("lorafleet_compiled_ahead", default=None)
"""Launches that `compiled_ahead` has met; None outside of it."""


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """What takes a kernel's arguments and options and launches it over `grid`, as Triton's `kernel[grid]` does."""
    seen = _seen.get()
    if seen is None:
        return kernel[grid]  # type: ignore[no-any-return]
    return partial(_compile, kernel, grid, seen)


@contextmanager
def compiled_ahead(num_threads: int) -> Iterator[None]:
    """Launches of this thread compute nothing within it; at its end, `num_threads` threads have compiled their kernels.

    What the launches would have written stays unwritten. A kernel that does not compile says so when it is launched.
    """
    assert _seen.get() is None, "within another"
    with (
        ThreadPoolExecutor(num_threads, thread_name_prefix="lorafleet-compile") as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
    ):
        token = _seen.set(set())
        try:
            yield
        finally:
            _seen.reset(token)


def _compile(kernel: Any, grid: tuple[int, ...], seen: set[Hashable], *arguments: object, **options: object) -> None:
    # Layers of a model launch alike, and Triton would look each launch up anew while its kernel is not ready.
    key = (kernel, tuple(map(_kind, arguments)), tuple(sorted(options.items())))
    if key not in seen:
        seen.add(key)
        kernel.warmup(*arguments, grid=grid, **options)


def _kind(argument: object) -> Hashable:
    """What Triton makes kernels differ by, or more. Should it be less, a kernel is compiled later than it could be."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return type(argument).__name__
