"""An adapter's weights in shared memory: one copy for all other ranks, which is gone when the last has read it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from lorafleet.adapter_store.manifest import NUMPY_DTYPES, AdapterManifest, AdapterWeights
from lorafleet.workers.group.control import Weights
from lorafleet.workers.group.shared_memory import make_memory


@contextmanager
def staged(weights: AdapterWeights) -> Iterator[int]:
    """A descriptor of memory that holds `weights.flat`."""
    descriptor = make_memory(max(1, weights.flat.nbytes))
    try:
        with mmap.mmap(descriptor, 0) as memory:
            there = np.frombuffer(memory, dtype=weights.flat.dtype, count=weights.flat.size)
            np.copyto(there, weights.flat)
            del there
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def read_staged(descriptor: int, staged_weights: Weights, manifest: AdapterManifest) -> Iterator[AdapterWeights]:
    """The weights at a descriptor, which is closed: to be read within the block."""
    try:
        memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    count = sum(rows * columns for rows, columns in staged_weights.shapes)
    flat = np.frombuffer(memory, dtype=NUMPY_DTYPES[staged_weights.dtype], count=count)
    yield AdapterWeights(manifest, staged_weights.dtype, flat, staged_weights.shapes)
