"""Launches every Triton kernel, and compiles a starting process' kernels, many at a time.

Triton's own launch binds, hashes and checks its arguments anew each time, which takes the host several times as long as
the launch itself. Here the compiled kernel is looked up by what Triton would specialise it for, and launched as it is.

Triton compiles a kernel when it is first launched, on one core. Within `compiled_ahead` launches compute nothing: what
they need is compiled by threads, and launches after it find it done.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import triton

_seen: ContextVar[set[Hashable] | None] = ContextVar("lorafleet_compiled_ahead", default=None)
"""Launches that `compiled_ahead` has met; None outside of it."""


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """Return a function that launches the kernel over `grid`, called like Triton's `kernel[grid]`.

    Constexprs and options are given by keyword, all other arguments by position.
    """
    seen = _seen.get()
    return partial(_launch, kernel, grid) if seen is None else partial(_compile, kernel, grid, seen)


@dataclass(frozen=True, slots=True)
class _Bound:
    """A compiled kernel, and the arguments that are the same at each of its launches."""

    run: Callable[..., object]
    function: int
    metadata: object
    constants: tuple[object, ...]


_bound: dict[Hashable, _Bound] = {}


@cache
def _has_gpu() -> bool:
    """Not asked on import: a process that has seen the GPUs cannot be given one of them any more."""
    return torch.cuda.is_available()


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    device = torch.cuda.current_device() if _has_gpu() else -1
    values: list[object] = []
    kinds: list[object] = [kernel, device]
    for each in arguments:
        if isinstance(each, torch.Tensor):
            # As a number it is taken as it is; of a tensor, Triton would ask the driver where it lies.
            pointer = each.data_ptr()
            values.append(pointer)
            kinds += (each.dtype, pointer % 16 == 0)
        else:
            values.append(each)
            kinds.append(_kind(each))
    key = (*kinds, *options.values())
    bound = _bound.get(key)
    if bound is None:
        compiled = kernel[grid](*arguments, **options)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
            _bound[key] = _Bound(compiled.run, compiled.function, compiled.packed_metadata, constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = triton.runtime.driver.active.get_current_stream(device)
    bound.run(x, y, z, stream, bound.function, bound.metadata, None, None, None, *values, *bound.constants)


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


def computes() -> bool:
    """Return False within `compiled_ahead`."""
    return _seen.get() is None


def _compile(kernel: Any, grid: tuple[int, ...], seen: set[Hashable], *arguments: object, **options: object) -> None:
    # Layers of a model launch alike, and Triton would look each launch up anew while its kernel is not ready.
    key = (kernel, tuple(map(_kind, arguments)), tuple(sorted(options.items())))
    if key not in seen:
        seen.add(key)
        kernel.warmup(*arguments, grid=grid, **options)


def _kind(argument: object) -> Hashable:
    """Return the properties by which Triton specialises kernels, or more. A missing one delays a compilation."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return type(argument).__name__
