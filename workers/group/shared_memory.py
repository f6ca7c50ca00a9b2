"""Shared memory without a name: it is passed on as a descriptor, and is gone with the last process that has it."""

from __future__ import annotations

import os
import tempfile


def make_memory(size: int) -> int:
    """A descriptor of `size` zero bytes, for `mmap`. The caller closes it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("lorafleet")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
