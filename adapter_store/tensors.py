"""Tensors as numpy holds them, in the float types that safetensors files bring, and their way to the served dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lorafleet.adapter_store.manifest import Array, Dtype

FloatTag = Literal["F64", "F32", "F16", "BF16"]

FLOAT_TAGS: Mapping[str, FloatTag] = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16"}

STORED: Mapping[FloatTag, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""How each type lies in a file and in numpy, which has no bfloat16: its bits are a uint16."""

SERVED: Mapping[Dtype, FloatTag] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_EXPONENT: Mapping[FloatTag, tuple[type[np.unsignedinteger], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
"""The exponent's bits, which are all ones in infinities and NaNs and in nothing else."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array together with the float type that its bits mean."""

    tag: FloatTag
    array: Array
    """C-contiguous, dtype `STORED[tag]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def is_finite(self) -> bool:
        """Return True if no element is NaN or infinite."""
        unsigned, exponent = _EXPONENT[self.tag]
        return int((self._bits() & unsigned(exponent)).max(initial=0)) != exponent

    def is_zero(self) -> bool:
        """Return True if every element is zero."""
        return not np.any(self._bits() << 1)

    def has_bits_of(self, other: Tensor) -> bool:
        """Return True if both hold the same bits. They must be of one type and shape."""
        return np.array_equal(self._bits(), other._bits())

    def _bits(self) -> npt.NDArray[np.unsignedinteger]:
        return self.array.reshape(-1).view(_EXPONENT[self.tag][0])

    def float64(self) -> npt.NDArray[np.float64]:
        """The same values, all of which float64 can hold."""
        return self.to("F64").array.astype(np.float64, copy=False)

    def to(self, tag: FloatTag) -> Tensor:
        """The same values in another float type, rounded to nearest even; too large ones become infinite."""
        if tag == self.tag:
            return self
        # bfloat16 is a float32 cut short: the way to it and from it leads over float32.
        if self.tag == "BF16":
            wide = (self.array.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return Tensor("F32", wide).to(tag)
        with np.errstate(over="ignore"):
            if tag != "BF16":
                return Tensor(tag, self.array.astype(STORED[tag]))
            bits = np.ascontiguousarray(self.array, dtype=np.float32).view(np.uint32)
        rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return Tensor("BF16", ((bits + rounding) >> np.uint32(16)).astype(np.uint16))
